"""Times whole training steps: benchmarks/results/training-<gpu>.json, which docs/training.md shows.

On one GPU, about a minute each, two for the compiled ones:

    python benchmarks/training.py --pixels 512 2048 --compile no       the sizes with a target
    python benchmarks/training.py --pixels 256 1024 --compile no
    python benchmarks/training.py --pixels 512 2048 --compile yes --models embedded
    python benchmarks/training.py --capped                             0.6B in 9 GiB: too little for one

On two, where the first line gives the speed of one:

    python benchmarks/training.py --models embedded --pixels 256 --mixers gspn2 --compile no
    torchrun --nproc_per_node 2 benchmarks/training.py --models embedded --pixels 256 \\
        --mixers gspn2 --compile no
    accelerate launch --config_file configs/accelerate/fsdp2.yaml benchmarks/training.py --capped

With ``--share_gpu`` both processes use one GPU, 9 GiB of it each, and talk through gloo, which tells what
fits but not how long it takes (`suite.sh fsdp2-on-one`; accelerate's launcher wants a GPU for each process).

Every cell is the trainer's own step (autocast, loss, backward pass, clipping, fused AdamW, averaging) on
batches that the trainer's own feed reads from a cache on the disk; only the cached rows are random numbers.
GSPN-2 and the same model with softmax attention alternate, so both meet the same machine; they are compared
within one run only. No cell is begun after ``--seconds``; what was left out is said. A run replaces the rows
that it measured again and keeps the others. ``--memory_gib`` caps the GPU's memory, to try what fits where.
``python benchmarks/render.py`` then writes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from result_files import RESULTS, device_name, merge, start, write
from training_cells import PIXELS, TEXT_TOKENS, TOKENS_IN_BATCH, CachedRows, Cell, build_model
from training_report import KEY, summary

from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.denoiser import DenoiserTask, plain_config
from gspn2_diffusion.training.guard import Guard
from gspn2_diffusion.training.loop import optimise, prepare_state
from gspn2_diffusion.training.runtime import Run, end_run, start_run

COMPILE_SECONDS = 25  # assumed for a cell; it is not begun when less is left


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
            message = str(error).splitlines()[0][:160]
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
    parser.add_argument("--capped", action="store_true", help="one 0.6B cell in 9 GiB: for FSDP2")
    parser.add_argument("--share_gpu", action="store_true", help="all processes on one GPU, over gloo")
    parser.add_argument("--tiny", action="store_true", help="a tiny model at small sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git history")
    options = parser.parse_args(argv)
    if options.tiny:
        options.models, options.pixels, options.compile = ["tiny"], [32, 64], "no"
    if options.capped:  # weights, gradients, moments and averages in float32 take 12 GB, a picture 1 GB
        options.models, options.pixels, options.compile = ["0.6b"], [256], "no"
        options.mixers, options.batch, options.memory_gib = ["gspn2"], 1, 9.0
    return options


def cap_memory(gigabytes: float) -> None:
    """Let this process use so much of its GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 2**30 / total))


def report(run: Run, options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> None:
    """Add the rows to the file, say what follows from it."""
    head = start(options.commit, tiny=options.tiny)
    settings = {"processes": run.world, "fsdp2": run.fsdp, "memory_cap_gib": options.memory_gib}
    settings |= {"shared_gpu": options.share_gpu}
    path = options.out or RESULTS / f"training-{device_name(run.device.type)}.json"
    merged = merge(path, head, [{**row, **settings} for row in rows], KEY)
    found = summary(merged)
    write(path, {**head, "rows": merged, **found, "seconds_of_last_run": seconds})
    for name in ("comparisons", "scaling", "capped"):
        for item in found[name]:
            run.say(f"{name}: {item}")
    run.say(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    started = time.monotonic()
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        precision = "no" if options.tiny else "bf16"
        config = DenoiserConfig(
            output_dir=folder, max_train_steps=1, pretrained="-", trackers="none", mixed_precision=precision
        )
        if options.share_gpu:  # NCCL wants a GPU for every process
            torch.distributed.init_process_group("gloo")
            os.environ["LOCAL_RANK"] = "0"  # by which accelerate and FSDP2 choose one
        run = start_run(config, started)
        if options.memory_gib is not None:
            cap_memory(options.memory_gib)
        rows, skipped = run_cells(run, options)
        if run.is_main:
            report(run, options, rows, time.monotonic() - started)
            for cell in skipped:
                run.say(f"no time was left for {cell}")
        end_run(run)


if __name__ == "__main__":
    main()
