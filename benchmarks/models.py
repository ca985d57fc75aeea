"""Whole denoisers at full size: GSPN-2 against the original attention and against no mixing at all.

One process, one machine, random weights, bfloat16, one picture. For every family and size: median
milliseconds of one denoiser call and peak memory, each output checked for values that are not numbers.
Blocks are compiled one by one (which fuses norms, modulation, gates and the feed-forward's product), and
calls below 100 ms are replayed as one CUDA graph; ``--modes eager`` leaves the blocks as they are.

    python benchmarks/models.py             everything; softmax SDXL at 16384 px alone takes minutes
    python benchmarks/models.py --quick     PixArt, Sana and SDXL up to 4096 px
    python benchmarks/models.py --families pixart --time-limit 150                       150 s on an H200
    python benchmarks/models.py --families sana --time-limit 150                         150 s
    python benchmarks/models.py --families sdxl --sizes 1024 4096 --time-limit 180       180 s
    python benchmarks/models.py --families sdxl --sizes 16384 --variants gspn2 none      100 s
    python benchmarks/models.py --families sdxl --sizes 16384 --variants attention --modes eager    150 s
    python benchmarks/models.py --tiny --device cpu --out /tmp/out.json     a try of the program itself

Adds to benchmarks/results/models-<gpu>.json after every family, and draws the plot (SVG) beside it; a run
replaces the rows that it measured again and keeps the others. ``python benchmarks/render.py`` then writes
the tables.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_families import (
    FAMILIES,
    VARIANTS,
    Family,
    build,
    change,
    fit_positions,
    is_converted,
    make_inputs,
    tiny,
)
from model_report import KEY, svg
from result_files import RESULTS, device_name, merge, stamp, start, write

# Milliseconds above which a call is long enough to hide its launches, and a graph would double its memory.
GRAPH_BELOW = 100.0
MODES = ("eager", "compiled")


class Clock:
    """Times calls on one device, with events on a GPU."""

    def __init__(self, device: str, seconds: float) -> None:
        self.cuda, self.seconds = device.startswith("cuda"), seconds

    def one(self, function: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    def median(self, function: Callable[[], Any]) -> float:
        """Median of as many calls as fit into the time, 3 to 50; a call of seconds is made once."""
        times = [self.one(function)]
        if times[0] > 2000:
            return times[0]
        count = min(50, max(3, int(1e3 * self.seconds / max(times[0], 1e-3))))
        times += [self.one(function) for _ in range(count - 1)]
        return statistics.median(times)

    def graphed(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function`` as a CUDA graph; its output stays in the graph's memory."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


def measure(model: Any, inputs: dict[str, Any], clock: Clock, single: bool) -> dict[str, Any]:
    """One row: ``ms``, ``peak_bytes`` (of eager calls, weights included), ``graph``, ``finite``."""
    output: list[torch.Tensor] = []

    def call() -> None:
        output[:] = model(**inputs)[:1]

    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = clock.one(call)  # also the warm-up
    if not single:
        first = clock.one(call)
    row: dict[str, Any] = {
        "finite": bool(torch.isfinite(output[0]).all()),
        "peak_bytes": torch.cuda.max_memory_allocated() if clock.cuda else None,
        "first_seconds": round(time.perf_counter() - start, 2),
    }
    if single:
        return {"ms": first, "graph": False, **row}
    if clock.cuda and first < GRAPH_BELOW:
        replay = clock.graphed(call)
        replay()
        row["finite"] = row["finite"] and bool(torch.isfinite(output[0]).all())
        return {"ms": clock.median(replay), "graph": True, **row}
    return {"ms": clock.median(call), "graph": False, **row}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Run:
    """The rows measured so far and where they go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = Clock(options.device, 0.3 if options.quick or options.tiny else 2.0)
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.started = time.monotonic()
        self.head = start(options.commit, tiny=options.tiny, dtype=str(options.dtype), batch=1)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.options.time_limit

    @torch.no_grad()
    def family(self, family: Family) -> None:
        """Every variant at every size."""
        model: Any = None
        last = max(VARIANTS.index(variant) for variant in self.options.variants)
        for variant in VARIANTS[: last + 1]:
            wanted = variant in self.options.variants
            if is_converted(family):
                model = (
                    build(family, variant, self.options.device, self.options.dtype)
                    if model is None
                    else model
                )
                change(model, variant)
            elif wanted:
                model = None
                free()
                model = build(family, variant, self.options.device, self.options.dtype)
            if wanted:
                self._variant(family, variant, model)
        del model
        free()

    def _variant(self, family: Family, variant: str, model: Any) -> None:
        for mode in self.options.modes:
            if mode == "compiled":
                compile_blocks(model)
            for pixels in self._sizes(family):
                name = f"{family.name} {pixels} {variant} {mode}"
                # A minute and more a call: once is enough, and only where it was asked for by a full run.
                single = family.name == "sdxl" and variant == "attention" and pixels > 8192
                if self.out_of_time or (single and mode == "compiled"):
                    self.skipped.append(name)
                    continue
                self._row(family, variant, mode, pixels, model, single)
            if mode == "compiled":
                undo_compile(model)

    def _sizes(self, family: Family) -> tuple[int, ...]:
        sizes = family.quick if self.options.quick else family.sizes
        return (
            tuple(size for size in family.sizes if size in self.options.sizes)
            if self.options.sizes
            else sizes
        )

    def _row(self, family: Family, variant: str, mode: str, pixels: int, model: Any, single: bool) -> None:
        row: dict[str, Any] = {"family": family.name, "pixels": pixels, "variant": variant, "mode": mode}
        try:
            fit_positions(model, pixels, family)
            inputs = make_inputs(family, pixels, self.options.device, self.options.dtype)
            row |= measure(model, inputs, self.clock, single)
        except torch.OutOfMemoryError as error:
            row["error"] = f"out of memory: {str(error).splitlines()[0][:200]}"
        except Exception as error:  # one variant that fails must not cost the others
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        self.rows.append(row)
        free()
        print(describe_row(row), flush=True)

    def write(self) -> Path:
        """The file with this run's rows, and the plot."""
        options = self.options
        path: Path = options.out or RESULTS / f"models-{device_name(options.device)}.json"
        rows = merge(path, self.head, self.rows, KEY)
        families = [tiny(family) if options.tiny else family for family in FAMILIES.values()]
        result = {
            **self.head,
            "seconds_of_last_run": round(time.monotonic() - self.started, 1),
            "skipped_in_last_run": self.skipped,
            "rows": rows,
            "comparisons": compare(rows, families),
        }
        write(path, result)
        path.with_suffix(".svg").write_text(svg(result), encoding="utf-8")
        return path


def compile_blocks(model: Any) -> None:
    """Compiles each block of its kind once (regional compilation)."""
    torch._dynamo.reset()
    names = {"BasicTransformerBlock", "SanaTransformerBlock", "GSPN2TransformerBlock"}
    for module in model.modules():
        if type(module).__name__ in names:
            module.compile(fullgraph=True, dynamic=False)


def undo_compile(model: Any) -> None:
    for module in model.modules():
        module._compiled_call_impl = None


def describe_row(row: dict[str, Any]) -> str:
    name = f"{row['family']:>10} {row['pixels']:>6} {row['variant']:>9} {row['mode']:>8}"
    if "error" in row:
        return f"{name}  {row['error']}"
    memory = f"{row['peak_bytes'] / 1e9:7.2f} GB" if row["peak_bytes"] else ""
    return f"{name} {row['ms']:10.2f} ms {memory} {'graph' if row['graph'] else '     '} " + (
        "" if row["finite"] else "NOT FINITE"
    )


def compare(rows: list[dict[str, Any]], families: list[Family]) -> list[dict[str, Any]]:
    """For every family, size and mode: time over "none", speed over "attention", and what was asked for.

    Attention that was measured in eager mode only (because it takes minutes) is what compiled rows meet, too.
    """
    measured = {
        (row["family"], row["pixels"], row["mode"], row["variant"]): row
        for row in rows
        if "ms" in row and row["finite"]
    }
    limits = {family.name: family for family in families}
    found = []
    for (name, pixels, mode, variant), row in measured.items():
        if variant != "gspn2" or name not in limits:
            continue
        others = {
            other: measured.get((name, pixels, mode, other)) or measured.get((name, pixels, "eager", other))
            for other in ("none", "attention")
        }
        found.append({"family": name, "pixels": pixels, "mode": mode} | judge(row, others, limits[name]))
    return found


def judge(row: dict[str, Any], others: dict[str, dict[str, Any] | None], family: Family) -> dict[str, Any]:
    """One comparison: ratios, limits, whether they are met, and whether one run made all of it."""
    over, faster = family.limits.get(row["pixels"], (None, None))
    at_most = family.peak_limits.get(row["pixels"])
    none, attention = others["none"], others["attention"]
    item: dict[str, Any] = {"gspn2_ms": row["ms"]}
    met = True
    if none:
        item |= {"over_none": row["ms"] / none["ms"], "over_none_at_most": over}
        met = met and (over is None or item["over_none"] <= over)
    if attention:
        item |= {"speedup": attention["ms"] / row["ms"], "speedup_at_least": faster}
        met = met and (faster is None or item["speedup"] >= faster)
    if at_most:
        item |= {"peak_bytes": row["peak_bytes"], "peak_bytes_at_most": at_most}
        met = met and (not row["peak_bytes"] or row["peak_bytes"] <= at_most)
    runs = {other["run"] for other in (row, none, attention) if other}
    return {**item, "met": met, "complete": bool(none and attention), "one_run": len(runs) == 1}


def selected(options: argparse.Namespace) -> list[Family]:
    chosen = options.families or [
        name for name, family in FAMILIES.items() if family.quick or not options.quick
    ]
    return [tiny(FAMILIES[name]) if options.tiny else FAMILIES[name] for name in chosen]


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["compiled"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--families", nargs="+", choices=FAMILIES)
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels along a side")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--time-limit", type=float, default=3600.0, help="start nothing new after so many seconds"
    )
    parser.add_argument("--out", type=Path, help="JSON file to add to; the plot goes beside it")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU (or --tiny --device cpu)")
    return options


def main() -> None:
    run = Run(read_options())
    torch.manual_seed(0)
    for family in selected(run.options):
        run.family(family)
        path = run.write()
    for item in compare(stamp(run.rows, run.head), selected(run.options)):
        print(item)
    print(f"wrote {path}")
    if any("error" in row or not row["finite"] for row in run.rows):
        sys.exit("some rows failed or are not finite")


if __name__ == "__main__":
    main()
