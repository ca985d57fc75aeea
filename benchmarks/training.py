"""Times whole training steps and writes benchmarks/results/training-<gpu>.json.

    python benchmarks/training.py
    torchrun --nproc_per_node 2 benchmarks/training.py --models embedded --pixels 256 --mixers gspn2

Every cell is the trainer's own step (autocast, loss, backward pass, clipping, fused AdamW, averaging) on
batches that the trainer's own feed reads from a cache on the disk; only the cached rows are random numbers.
GSPN-2 and the same model with softmax attention alternate, so both meet the same machine. A first pass runs
everything uncompiled, a second repeats the cells with torch.compile until ``--seconds`` are used up; what was
left out is listed. ``--memory_gib`` caps the GPU's memory, to try what fits where.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.training.config import DenoiserConfig, read_mapping
from gspn2_diffusion.training.denoiser import DenoiserTask, plain_config
from gspn2_diffusion.training.guard import Guard
from gspn2_diffusion.training.latents import LatentBatch
from gspn2_diffusion.training.loop import optimise, prepare_state
from gspn2_diffusion.training.picture_cache import Entry
from gspn2_diffusion.training.picture_feed import BatchPlan, PictureFeed
from gspn2_diffusion.training.rows import RowStore
from gspn2_diffusion.training.runtime import Run, end_run, start_run
from gspn2_diffusion.training.text import TextStates

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PIXELS_PER_TOKEN_SIDE = 16  # f8 latents, patch 2
PIXELS = (512, 2048, 256, 1024)  # the two that acceptance asks for come first
TEXT_TOKENS = {"embedded": 32, "0.6b": 300, "tiny": 8}
TOKENS_IN_BATCH = {"embedded": 2**17, "0.6b": 2**14, "tiny": 64}
COMPILE_SECONDS = 25  # assumed for a cell; it is not begun when less is left


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    pixels: int
    mixer: str
    compiled: bool

    @property
    def tokens(self) -> int:
        """Picture tokens."""
        return (self.pixels // PIXELS_PER_TOKEN_SIDE) ** 2


class CachedRows:
    """A source of batches out of a cache that holds random rows; see `training.sources.LatentSource`."""

    def __init__(self, run: Run, folder: Path, model: Any, cell: Cell, batch_size: int) -> None:
        side = cell.pixels // PIXELS_PER_TOKEN_SIDE * model.config.patch_size
        self._shape = (model.config.in_channels, side, side)
        self._text = (TEXT_TOKENS[cell.model], model.config.caption_channels)
        self._pooled = model.config.pooled_projection_dim
        half = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        latents, texts = RowStore(folder / "latents"), RowStore(folder / "text")
        entries = self._fill(latents, texts, max(batch_size * 2, 16), half, run.rank)
        self.prompts: list[str] = []
        self._empty = TextStates(
            torch.zeros(1, *self._text, dtype=half, device=run.device),
            torch.ones(1, self._text[0], dtype=torch.bool, device=run.device),
            torch.zeros(1, self._pooled or 1, dtype=half, device=run.device),
        )
        plan = BatchPlan(entries, [self._shape] * len(entries), batch_size, run.rank)
        self._feed = PictureFeed(plan, latents, texts, first=0, stride=1, device=run.device, depth=8)
        self.vae = None

    def _fill(
        self, latents: RowStore, texts: RowStore, count: int, half: torch.dtype, rank: int
    ) -> list[Entry]:
        keys = [f"{rank}-{number}" for number in range(count)]
        length, width = self._text
        for key in keys:
            latents.add(key, {"latents": torch.randn(self._shape).half()})
            row = {"hidden": torch.randn(length, width).to(half), "mask": torch.ones(length).bool()}
            texts.add(key, row | {"pooled": torch.randn(self._pooled or 1).to(half)})
        for store in (latents, texts):
            store.flush()
            store.reload()
        return [Entry(key, key, (key,), ("",)) for key in keys]

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for batches."""
        return self._feed.wait_seconds

    def empty(self, device: torch.device) -> TextStates:
        """The dropped caption."""
        return self._empty

    def draw(self, micro: int, generator: torch.Generator) -> LatentBatch:
        """The next batch."""
        return self._feed.next()

    def fixed_sets(self) -> list[Any]:
        """None: nothing is validated here."""
        return []

    def describe(self, step: int) -> str:
        """For error messages."""
        return "random rows"

    def close(self) -> None:
        """End the thread."""
        self._feed.close()


def build_model(cell: Cell) -> Any:
    """The denoiser of a cell with random weights; GSPN-2 and softmax differ in the mixer alone."""
    if cell.model == "tiny":
        return GSPN2Transformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_channels=16, mixer=cell.mixer
        )
    name = {"embedded": "gspn2-emoji", "0.6b": "gspn2-0.6b"}[cell.model]
    shape = read_mapping(ROOT / "configs" / f"{name}-transformer.json")
    return GSPN2Transformer2DModel.from_config({**shape, "mixer": cell.mixer})


def measure(run: Run, cell: Cell, batch_size: int, seconds: float) -> dict[str, Any]:
    """Time, speed, memory and data-wait share of a cell's training steps."""
    config: Any = dataclasses.replace(run.config, batch_size=batch_size, compile=cell.compiled)
    run = dataclasses.replace(run, config=config)
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(run.device)
    with run.device:
        model = build_model(cell)
    state = prepare_state(run, model, plain_config(model))
    with tempfile.TemporaryDirectory(dir=run.output) as folder:
        source = CachedRows(run, Path(folder), model, cell, batch_size)
        task = DenoiserTask(run, config, source, state, source)  # type: ignore[arg-type]
        try:
            found = timed_steps(run, state, task, seconds)
        finally:
            task.close()
    memory = torch.cuda.max_memory_allocated(run.device) / 2**30 if cuda else 0.0
    speed = batch_size * run.world / found["seconds_per_step"]
    return {
        **dataclasses.asdict(cell),
        "tokens": cell.tokens,
        "batch_per_gpu": batch_size,
        "parameters": sum(param.numel() for param in model.parameters()),
        **found,
        "pictures_per_second": speed,
        "memory_gib": memory,
    }


def timed_steps(run: Run, state: Any, task: DenoiserTask, seconds: float) -> dict[str, float]:
    """Warm up, then as many steps as fit into the time, at least five."""
    guard = Guard(run.device)

    def step() -> None:
        optimise(run, state, task, guard)
        state.step += 1

    def finished() -> float:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return time.monotonic()

    before = finished()
    for _ in range(3):
        step()
    warm = finished()
    step()
    once = finished() - warm
    count = max(5, min(200, int(seconds / max(once, 1e-6))))
    if run.world > 1:  # the same on all ranks
        count = int(run.accelerator.reduce(torch.tensor(float(count), device=run.device), "mean"))
    started, waited = finished(), task.wait_seconds
    for _ in range(count):
        step()
    spent = finished() - started
    if guard.first_bad_step() is not None:
        raise RuntimeError("a gradient was not finite; the cell is not timed")
    return {
        "steps": count,
        "seconds_per_step": spent / count,
        "data_wait": (task.wait_seconds - waited) / spent,
        "warm_up_seconds": warm - before,
    }


def try_cell(run: Run, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a cell; where memory does not suffice, at half the batch, down to one picture."""
    batch = options.batch or max(1, TOKENS_IN_BATCH[cell.model] // cell.tokens)
    while True:
        try:
            return measure(run, cell, batch, options.seconds_per_cell)
        except torch.OutOfMemoryError as error:
            message = str(error).split(".")[0]
        clean(run)
        if batch == 1 or run.world > 1:
            return {**dataclasses.asdict(cell), "tokens": cell.tokens, "error": f"out of memory: {message}"}
        batch //= 2


def clean(run: Run) -> None:
    """Give back what the last cell took."""
    run.accelerator.free_memory()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much faster GSPN-2 is than softmax attention, cell by cell, at equal batches."""
    known = {(r["model"], r["pixels"], r["compiled"], r["mixer"]): r for r in rows if "seconds_per_step" in r}
    found = []
    for (model, pixels, compiled, mixer), row in known.items():
        other = known.get((model, pixels, compiled, "softmax"))
        if mixer != "gspn2" or other is None:
            continue
        speedup = row["pictures_per_second"] / other["pictures_per_second"]
        wanted = {1024: 1.0, 16384: 1.5}.get(row["tokens"])
        found.append(
            {
                "model": model,
                "tokens": row["tokens"],
                "compiled": compiled,
                "speedup": speedup,
                **({} if wanted is None else {"wanted": wanted, "met": speedup >= wanted}),
            }
        )
    return found


def plan(options: argparse.Namespace) -> list[Cell]:
    """Cells in the order in which they are measured."""
    passes = {"no": (False,), "yes": (True,), "both": (False, True)}[options.compile]
    return [
        Cell(model, pixels, mixer, compiled)
        for compiled in passes
        for pixels in options.pixels
        for model in options.models
        for mixer in options.mixers
    ]


def run_cells(run: Run, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows, and the cells for which no time was left."""
    rows, skipped = [], []
    for cell in plan(options):
        left = options.seconds - (time.monotonic() - run.started)
        enough = torch.tensor(float(left > (COMPILE_SECONDS if cell.compiled else 8)), device=run.device)
        if run.world > 1:
            enough = run.accelerator.reduce(enough, "mean")
        if float(enough) < 1:
            skipped.append(dataclasses.asdict(cell))
            continue
        row = try_cell(run, cell, options)
        clean(run)
        rows.append(row)
        run.say(describe(row))
    return rows, skipped


def describe(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['model']:>9} {row['pixels']:>5} px {row['tokens']:>6} tokens {row['mixer']:>8}"
    head += " compiled" if row["compiled"] else "    eager"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} batch {row['batch_per_gpu']:>4} {row['seconds_per_step'] * 1e3:>8.1f} ms "
        f"{row['pictures_per_second']:>8.1f} pictures/s {row['memory_gib']:>6.1f} GiB "
        f"data wait {row['data_wait']:.1%}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["embedded", "0.6b"], choices=list(TEXT_TOKENS))
    parser.add_argument("--pixels", nargs="+", type=int, default=list(PIXELS))
    parser.add_argument("--mixers", nargs="+", default=["gspn2", "softmax"])
    parser.add_argument("--compile", default="both", choices=("no", "yes", "both"))
    parser.add_argument("--seconds", type=float, default=140, help="no cell begins after this time")
    parser.add_argument("--seconds_per_cell", type=float, default=1.5, help="time for the measured steps")
    parser.add_argument("--batch", type=int, default=None, help="pictures per GPU in every cell")
    parser.add_argument("--memory_gib", type=float, default=None, help="cap of the GPU's memory")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at small sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git history")
    options = parser.parse_args(argv)
    if options.tiny:
        options.models, options.pixels, options.compile = ["tiny"], [32, 64], "no"
    return options


def cap_memory(gigabytes: float) -> None:
    """Let this process use so much of its GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        precision = "no" if options.tiny else "bf16"
        config = DenoiserConfig(
            output_dir=folder, max_train_steps=1, pretrained="-", trackers="none", mixed_precision=precision
        )
        run = start_run(config, started)
        if options.memory_gib is not None:
            cap_memory(options.memory_gib)
        rows, skipped = run_cells(run, options)
        if run.is_main:
            name = (
                torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
            )
            result = {
                **describe_environment(),
                **({"commit": options.commit} if options.commit else {}),
                "processes": run.world,
                "fsdp2": run.fsdp,
                "memory_cap_gib": options.memory_gib,
                "cells": rows,
                "comparisons": compare(rows),
                "skipped": skipped,
                "seconds": time.monotonic() - started,
            }
            path = options.out or RESULTS / f"training-{name.replace(' ', '-').lower()}-x{run.world}.json"
            write(path, result)
            for row in result["comparisons"]:
                run.say(str(row))
            run.say(f"wrote {path}; {len(skipped)} cells were left out")
        end_run(run)


if __name__ == "__main__":
    main()
