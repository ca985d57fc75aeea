"""The part of ``gspn2 batch`` that loads a model and draws."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.batch import manifest, plan
from gspn2_diffusion.cli import adapters, few_steps, options
from gspn2_diffusion.cli.console import CliError, describe, fast_imports, quiet_libraries, say
from gspn2_diffusion.cli.stopping import StopFlag

if TYPE_CHECKING:
    import torch

    from gspn2_diffusion.batch.runner import Runner
    from gspn2_diffusion.cli.generate import Screen
    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.png_metadata import GenerationSettings

EXIT_SOME_FAILED = 3


@dataclass(frozen=True)
class Request:
    """The checked command line."""

    pictures: list[plan.Picture]
    out: Path
    name: str
    suffix: str
    batch_size: int | None
    model: str
    device: str
    dtype: str
    rank: int
    world: int
    loras: dict[str, adapters.Lora] = field(default_factory=dict)


@dataclass
class Reporter:
    """Tells the user about each picture: names or JSON events on stdout, progress and failures on stderr.

    ``started`` and ``ended`` are when drawing began and when all was saved, in seconds of the epoch.
    """

    screen: Screen
    out: Path
    as_json: bool
    quiet: bool
    rank: int
    total: int = 0
    started: float = 0.0
    ended: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def event(self, name: str, **values: Any) -> None:
        """One line of JSON on stdout, if events are wanted."""
        if self.as_json:
            line = json.dumps({"event": name, "rank": self.rank, **values}, ensure_ascii=False)
            say(line, sys.stdout)

    def record(self, record: manifest.Record) -> None:
        """A picture was saved or has failed."""
        self.counts[record["status"]] += 1
        self.event("picture", **record)
        if record["status"] == "done":
            if not self.as_json and not self.quiet:
                self.screen.finished(self.out / record["file"])
        else:
            say(f"failed: picture {record['index']}, {record['prompt']!r}: {record['error']}")
        self.progress()

    def span(self) -> dict[str, float]:
        """When this process drew and saved, without loading the model and waiting for other processes."""
        return {"started": round(self.started, 3), "ended": round(self.ended, 3)}

    def progress(self) -> None:
        """Moves the bar."""
        finished = self.counts["done"] + self.counts["failed"]
        self.screen.show("drawing", finished, self.total)


def run(request: Request, as_json: bool, quiet: bool) -> int:
    """Draws a checked request and returns the exit code: 0, 3 if a picture failed, 130 if interrupted.

    Raises:
        CliError: no model, another run in the folder, or the folder cannot be written.
    """
    from gspn2_diffusion.cli.generate import Screen

    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            stack.enter_context(manifest.occupy(request.out, request.rank))
        except OSError as error:
            raise CliError(f"--out {str(request.out)!r}: {describe(error)}") from error
        stop = stack.enter_context(StopFlag())
        stack.enter_context(quiet_libraries())
        screen = stack.enter_context(Screen(quiet or as_json or request.rank > 0))
        reporter = Reporter(screen, request.out, as_json, quiet, request.rank)
        try:
            _draw(request, reporter, stop)
        except OSError as error:
            raise CliError(f"--out {str(request.out)!r} cannot be written: {describe(error)}") from error
    _wait_for_others(request)
    counts = {name: reporter.counts[name] for name in ("done", "failed", "skipped")}
    seconds = round(time.perf_counter() - start, 3)
    interrupted = bool(stop)
    reporter.event("end", **counts, interrupted=interrupted, seconds=seconds, **reporter.span())
    if interrupted:
        return 130
    if counts["failed"]:
        say(f"error: {counts['failed']} of {sum(counts.values())} pictures failed; see {manifest.MANIFEST}")
        return EXIT_SOME_FAILED
    return 0


def _wait_for_others(request: Request) -> None:
    """All processes end together: a launcher stops the others as soon as one ends with a failure."""
    if request.world == 1 or "MASTER_ADDR" not in os.environ:
        return
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return
    dist.init_process_group(
        "gloo", rank=request.rank, world_size=request.world, timeout=datetime.timedelta(days=30)
    )
    dist.barrier()
    dist.destroy_process_group()


def _draw(request: Request, reporter: Reporter, stop: StopFlag) -> None:
    from gspn2_diffusion.batch import runner as running
    from gspn2_diffusion.cli import loading

    source = loading.find_model(request.model)
    reporter.screen.show(f"loading {loading.display_name(request.model)}")
    with fast_imports():
        import torch  # noqa: F401

    device = _device(request)
    dtype = options.resolve_dtype(request.dtype, device)
    pipe, folder = loading.load_pipeline(source, device, dtype)
    quiet = reporter.quiet or request.rank > 0
    request = dataclasses.replace(request, pictures=_with_few_steps(request.pictures, pipe, device, quiet))
    resolved = list(_resolve(request, pipe, folder, device, dtype))
    jobs, twice = plan.make_jobs(resolved, request.name, request.suffix)
    if twice and request.rank == 0:
        say(f"note: {twice} pictures were asked for twice with the same settings; each is drawn once")
    mine = plan.share(jobs, request.rank, request.world)
    left, adopted = running.open_jobs(request.out, mine)
    manifest.append(request.out, adopted)
    reporter.counts["skipped"] = len(mine) - len(left)
    reporter.total = len(left)
    reporter.event("plan", total=len(mine), skipped=len(mine) - len(left))
    reporter.progress()
    runner = _runner(request, pipe, device, reporter, stop)
    reporter.started, begin = time.time(), time.perf_counter()
    try:
        runner.run(_without_impossible(left, pipe, runner))
    finally:  # the clock of the day may be set back meanwhile
        reporter.ended = reporter.started + time.perf_counter() - begin


def _with_few_steps(
    pictures: list[plan.Picture], pipe: GSPN2Pipeline, device: torch.device, quiet: bool
) -> list[plan.Picture]:
    """The pictures, those that leave it to the device decided."""
    from gspn2_diffusion.pipelines.model_folders import own_sampling

    decided: dict[bool | None, dict[str, Any]] = {True: {}, False: {}, None: {"few_steps": False}}
    for wanted in {picture.few_steps for picture in pictures}:
        if few_steps.choose(wanted, False, pipe.config, device.type, quiet) and wanted is None:
            steps, guidance = own_sampling(pipe.config, None, None, few_steps=True)
            decided[None] = {"few_steps": True, "steps": steps, "guidance": guidance}
    return [dataclasses.replace(picture, **decided[picture.few_steps]) for picture in pictures]


def _device(request: Request) -> torch.device:
    """With several processes ``auto`` is the GPU of the process's number on this machine."""
    import torch

    name = request.device
    if request.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
        torch.cuda.set_device(name)
    return options.resolve_device(name)


def _resolve(
    request: Request, pipe: GSPN2Pipeline, folder: Path, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[plan.Picture, GenerationSettings]]:
    from gspn2_diffusion.cli import loading
    from gspn2_diffusion.cli.rendering import common_settings
    from gspn2_diffusion.png_metadata import GenerationSettings

    common = common_settings(pipe, folder, loading.display_name(request.model), device, dtype)
    for picture in request.pictures:
        yield (
            picture,
            GenerationSettings(
                prompt=picture.prompt,
                negative_prompt=picture.negative,
                steps=picture.steps,
                guidance_scale=picture.guidance,
                seed=picture.seed,
                height=picture.height or pipe.default_size,
                width=picture.width or pipe.default_size,
                loras=[request.loras[name].used(weight) for name, weight in picture.loras],
                few_steps=bool(picture.few_steps),
                **common,
            ),
        )


def _runner(
    request: Request, pipe: GSPN2Pipeline, device: torch.device, reporter: Reporter, stop: StopFlag
) -> Runner:
    from gspn2_diffusion.batch.runner import Runner
    from gspn2_diffusion.batch.sizes import BatchSizes
    from gspn2_diffusion.cli import rendering

    switch = adapters.LoraSwitch(pipe, request.loras.values())

    def draw(settings: Sequence[GenerationSettings]) -> rendering.Drawn:
        switch.use(settings[0].loras, settings[0].few_steps)
        return rendering.draw_batch(pipe, settings)

    def drawn(height: int, width: int, count: int) -> None:
        reporter.event("batch", height=height, width=width, count=count)

    return Runner(
        folder=request.out,
        draw=draw,
        sizes=BatchSizes.of(request.batch_size, device),
        report=reporter.record,
        drawn=drawn,
        stop=stop.__bool__,
        writers=_writers(request.world),
    )


def _writers(world: int) -> int:
    """Threads that encode pictures: this process's share of the cores, but for the one that draws."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    return max(1, min(12, cores // local - 1))


def _without_impossible(jobs: list[plan.Job], pipe: GSPN2Pipeline, runner: Runner) -> list[plan.Job]:
    """The jobs whose size the model can draw; the others are recorded as failed."""
    possible = []
    for job in jobs:
        size, multiple = (job.settings.width, job.settings.height), pipe.size_multiple
        if any(pixels % multiple for pixels in size):
            runner.reject(job, f"{size[0]}x{size[1]} pixels: this model draws multiples of {multiple}")
        else:
            possible.append(job)
    return possible
