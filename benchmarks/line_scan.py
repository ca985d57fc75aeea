"""Times the line scan on this machine's GPU and writes benchmarks/results/line_scan-<gpu>.json.

Every case is checked against the reference first; a wrong one is not timed. Times are medians of CUDA-graph
replays, measured with device events, over inputs that together exceed the L2 cache. In the same run: the copy
bandwidth, GSPN-1's scheme, and whole mixers with their projections against softmax and linear attention.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scan_report
import torch
from timing import copy_bandwidth, time_graph, write_result

from gspn2_diffusion import line_scan
from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.plans import Problem, generic_plan

DIRECTIONS = [0, 1, 2, 3]
CASES = [  # (B, H, W, C)
    (1, 64, 64, 32),
    (1, 64, 64, 144),
    (1, 256, 256, 64),
    (1, 256, 256, 144),
    (8, 256, 256, 64),
    (32, 32, 32, 192),
    (512, 16, 16, 96),
    (2, 64, 64, 144),
    (1, 64, 64, 768),
    (1, 64, 64, 1152),
    (1, 128, 128, 32),
    (1, 128, 128, 144),
    (1, 512, 512, 128),
    (1, 512, 512, 144),
    (16, 1024, 1024, 8),
    (64, 1024, 1024, 1),
    (1, 1024, 1024, 144),
    (32, 74, 74, 64),
    (1, 2048, 2048, 48),
    (1, 135, 240, 144),
    (1, 512, 512, 48),
    (1, 1024, 1024, 48),
    (1, 4096, 4096, 48),
]
QUICK = 7
GSPN1_CASES = {(1, 256, 256, 64), (16, 1024, 1024, 8), (64, 1024, 1024, 1)}
MINIMUM_BYTES = 256 * 2**20  # rotate through more than any L2 holds
MIXER_WIDTH, MIXER_HEADS = 1152, 18
MIXER_SIDES = (16, 32, 64, 128, 256, 512, 1024)  # tokens of pictures of 256 to 16,384 pixels
LONGEST_SOFTMAX = 256  # side; beyond it one call takes seconds
SCALING = (48, (512, 4096))  # channels, sides between which the growth of the time is measured
SMALL_CHANNELS = 16  # with fewer, the directions lie apart in memory


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # x, weight, lam, u


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """``"1x64x64x144"`` as numbers.

    Raises:
        argparse.ArgumentTypeError: it is not four numbers above 0.
    """
    sizes = [int(part) for part in text.split("x") if part.isdecimal()]
    if len(sizes) != 4 or text.count("x") != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B x H x W x C, such as 1x64x64x144")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def make_inputs(shape: tuple[int, int, int, int], count: int, apart: bool = False) -> list[Inputs]:
    """Random inputs, contiguous.

    ``apart``, and of few channels: ``weight, lam, u`` are ``(D, B, H, W, ...)`` in memory.
    """
    *grid, channels = shape
    d = len(DIRECTIONS)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    def draw_all(*size: int) -> torch.Tensor:
        if apart or channels < SMALL_CHANNELS:
            return draw(d, *grid, *size).movedim(0, 3)
        return draw(*grid, d, *size)

    return [
        (draw(*grid, channels), draw_all(1, 3), draw_all(channels), draw_all(channels)) for _ in range(count)
    ]


def check(inputs: Inputs) -> float:
    """Relative error of the kernel against the float32 reference, on the first batch entry.

    Of pictures with more than 1024 lines only a part is small enough for the reference, and a part may be
    scanned in other tiles; so the whole is compared with the generic kernel besides.

    Raises:
        SystemExit: it is not within bfloat16's tolerance.
    """
    first = [t[:1, :1024, :1024] for t in inputs]
    got = line_scan(*first, backend="cupy")
    errors = [relative_error(got, line_scan(*(t.float() for t in first), backend="reference"))]
    x = inputs[0]
    if max(x.shape[1:3]) > 1024:
        batch, height, width, channels = x.shape
        problem = Problem(batch, height, width, channels, 1, tuple(DIRECTIONS), 0, 2, False)
        plan = generic_plan(problem, 1, cupy_backend.shared_limit(x.device.index))
        want, _ = scan_kernels.line_scan_forward(*inputs, DIRECTIONS, 0, True, False, plan=plan)
        errors.append(relative_error(line_scan(*inputs, backend="cupy"), want))
    if not all(error <= 4e-3 for error in errors):  # false for NaN, too
        sys.exit(f"wrong result, not timed: shape {tuple(x.shape)}, relative errors {errors}")
    return max(errors)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def measure(
    shape: tuple[int, int, int, int], bandwidth: float, replays: int, apart: bool = False
) -> dict[str, Any]:
    """Forward and backward of one shape; targets as in benchmarks/README.md."""
    batch, height, width, channels = shape
    pixels, d, lines = batch * height * width, len(DIRECTIONS), max(height, width)
    forward_bytes = 2 * pixels * (channels + d * 3 + 3 * d * channels)  # x, weight, lam, u in; y out
    # dy, x, weight, lam, u, h in; the gradients of x, weight, lam, u out
    backward_bytes = 2 * pixels * (2 * channels + 2 * d * 3 + 6 * d * channels)
    sets = make_inputs(shape, max(1, -(-MINIMUM_BYTES // forward_bytes)), apart)
    error = check(sets[0])

    def forward() -> None:
        for s in sets:
            scan_kernels.line_scan_forward(*s, DIRECTIONS, 0, True, False)

    forward_ms = time_graph(forward, replays) / len(sets)
    kept = (scan_kernels.line_scan_forward(*s, DIRECTIONS, 0, True, True)[1] for s in sets)
    states = [state for state in kept if state is not None]
    dy = torch.randn_like(states[0])

    def backward() -> None:
        for s, state in zip(sets, states, strict=True):
            scan_kernels.line_scan_backward(dy, *s, state, DIRECTIONS, 0, True)

    backward_ms = time_graph(backward, replays) / len(sets)
    row: dict[str, Any] = {
        "shape": list(shape),
        "relative_error": error,
        "forward_ms": forward_ms,
        "forward_share_of_copy": forward_bytes / (forward_ms * 1e-3) / bandwidth,
        "forward_target_ms": (forward_bytes / (0.85 * bandwidth) + 6e-6 + lines * 60e-9) * 1e3,
        "backward_ms": backward_ms,
        "backward_share_of_copy": backward_bytes / (backward_ms * 1e-3) / bandwidth,
        "backward_target_ms": (backward_bytes / (0.7 * bandwidth) + 12e-6 + lines * 140e-9) * 1e3,
        "saved_bytes_per_element_of_y": states[0].element_size(),
    }
    if shape in GSPN1_CASES:
        row["gspn1_scheme"] = measure_gspn1(sets[0])
    return row


def measure_gspn1(inputs: Inputs) -> dict[str, float]:
    from gspn1_scheme import GSPN1Scheme

    scheme = GSPN1Scheme(*inputs)
    forward_ms = time_graph(scheme.forward, 3)
    y = torch.stack([t.permute(0, 2, 3, 1) for t in scheme.y], dim=3)
    ours = line_scan(*inputs, backend="cupy")
    error = relative_error(y, ours)
    del y, ours
    if not error <= 5e-2:  # its states are rounded to bfloat16 at every line
        sys.exit(f"GSPN-1's scheme differs from the line scan by {error:.2e}; not timed")
    return {"forward_ms": forward_ms, "backward_ms": time_graph(scheme.backward, 3), "difference": error}


def measure_mixers(side: int, replays: int) -> dict[str, float]:
    """Milliseconds of one mixer with its projections, no gradient, for ``side * side`` tokens."""
    from diffusers.models.attention_processor import Attention

    from gspn2_diffusion.layers.attention import ReLULinearAttnProcessor

    tokens = torch.randn(1, side * side, MIXER_WIDTH, device="cuda", dtype=torch.bfloat16)
    head = MIXER_WIDTH // MIXER_HEADS
    attention = Attention(MIXER_WIDTH, heads=MIXER_HEADS, dim_head=head, bias=True)
    linear = Attention(MIXER_WIDTH, heads=MIXER_HEADS, dim_head=head, bias=True)
    linear.set_processor(ReLULinearAttnProcessor())  # type: ignore[arg-type]
    linear.norm_q = linear.norm_k = torch.nn.Identity()  # type: ignore[assignment]
    mixer = GSPN2Mixer(MIXER_WIDTH)
    for module in (attention, linear, mixer):
        module.to("cuda", torch.bfloat16)
    times = {
        "tokens": side * side,
        "gspn2_ms": time_graph(lambda: mixer(tokens, side, side), replays),
        "linear_ms": time_graph(lambda: linear.processor(linear, tokens, height=side, width=side), replays),
    }
    if side <= LONGEST_SOFTMAX:
        times["softmax_ms"] = time_graph(lambda: attention(tokens), replays)
    return times


def host_microseconds(calls: int = 200, rounds: int = 25) -> float:
    """Host time of one ``line_scan`` call without gradients, checks included, after warm-up.

    The median of rounds: a single one is over in 3 ms and may meet whatever else the host does.
    """
    inputs = make_inputs((1, 64, 64, 64), 1)[0]
    for _ in range(20):
        line_scan(*inputs)
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            line_scan(*inputs)
        found.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of the time over pixels between two sizes of picture: 1 for time linear in pixels."""
    channels, sides = SCALING
    found = {row["shape"][1]: row for row in rows if row["shape"][3] == channels and row["shape"][1] in sides}
    if len(found) < len(sides):
        return {}
    small, large = (found[side] for side in sides)
    pixels = 2 * math.log(sides[1] / sides[0])
    names = ("forward", "backward")
    return {name: math.log(large[f"{name}_ms"] / small[f"{name}_ms"]) / pixels for name in names}


def compile_seconds() -> dict[str, float]:
    """Seconds to compile every kernel into an empty cache, and to load them all again from it."""
    program = (
        "import time, torch; from gspn2_diffusion.ops import cupy_backend as backend; torch.zeros(1).cuda(); "
        "start = time.perf_counter(); backend.compile_all(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUPY_CACHE_DIR": folder}
        command = [sys.executable, "-c", program]
        runs = [
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            for _ in range(2)
        ]
    cold, warm = (float(run.stdout.split()[-1]) for run in runs)
    return {"cold": cold, "from_cache": warm, "kernels": len(cupy_backend.variants())}


def print_row(row: dict[str, Any]) -> None:
    shape = ",".join(map(str, row["shape"]))
    parts = [f"{shape:>18}"]
    for name in ("forward", "backward"):
        met = "yes" if row[f"{name}_ms"] <= row[f"{name}_target_ms"] else "no"
        times = f"{row[f'{name}_ms']:9.4f} {row[f'{name}_share_of_copy']:6.1%}"
        parts.append(f"{times} {row[f'{name}_target_ms']:9.4f} {met:>3}")
    if scheme := row.get("gspn1_scheme"):
        both = (scheme["forward_ms"] + scheme["backward_ms"]) / (row["forward_ms"] + row["backward_ms"])
        parts.append(f"GSPN-1's scheme: {scheme['forward_ms'] / row['forward_ms']:.1f}x, both {both:.1f}x")
    if apart := row.get("apart"):
        parts.append(f"directions apart: {apart['forward_ms']:.4f}, {apart['backward_ms']:.4f}")
    print("  ".join(parts), flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first cases only, fewer replays")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git history")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="only these; prints, writes nothing")
    parser.add_argument("--apart", action="store_true", help="each direction's inputs together in memory")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    if options.apart and not options.shapes:
        sys.exit("--apart is for --shapes: the results are of one layout")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    rows = []
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; bfloat16, G=1, four directions")
    print(f"{'B,H,W,C':>18}  {'forward ms, of copy, target, met':>32}  {'backward':>32}")
    for shape in options.shapes or (CASES[:QUICK] if options.quick else CASES):
        rows.append(measure(shape, bandwidth, 20, options.apart))
        if shape[3] >= SMALL_CHANNELS and not (options.quick or options.shapes):
            torch.cuda.empty_cache()
            other = measure(shape, bandwidth, 20, apart=True)
            rows[-1]["apart"] = {name: other[name] for name in ("forward_ms", "backward_ms")}
        print_row(rows[-1])
        torch.cuda.empty_cache()
    if options.shapes:
        return
    mixers = []
    for side in MIXER_SIDES[:3] if options.quick else MIXER_SIDES:
        mixers.append(measure_mixers(side, 20))
        print("  ".join(f"{name} {value:.4g}" for name, value in mixers[-1].items()), flush=True)
    host = host_microseconds()
    print(f"host time of a call: {host:.1f} us; growth with pixels: {growth(rows)}")
    compiled = compile_seconds()
    print(f"compiling: {compiled}")
    result = {
        "copy_bytes_per_second": bandwidth,
        "dtype": "bfloat16",
        "cases": rows,
        "mixers": {"width": MIXER_WIDTH, "rows": mixers},
        "host_microseconds": host,
        "growth_exponents": growth(rows),
        "compile_seconds": compiled,
    }
    path = write_result(result, options.out, "line_scan", options.commit)
    path.with_suffix(".svg").write_text(scan_report.svg(result), encoding="utf-8")
    print(f"wrote {path} and its plot")


if __name__ == "__main__":
    main()
