"""Times the line scan on this machine's GPU and writes benchmarks/results/line_scan-<gpu>.json.

Every case is checked against the reference first; a wrong one is not timed. Times are medians of CUDA-graph
replays, measured with device events, over inputs that together exceed the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.ops.torch_library import line_scan_backward, line_scan_forward

RESULTS = Path(__file__).parent / "results"
DIRECTIONS = [0, 1, 2, 3]
CASES = [  # (B, H, W, C)
    (1, 64, 64, 64),
    (1, 64, 64, 144),
    (1, 256, 256, 144),
    (8, 256, 256, 64),
    (32, 32, 32, 192),
    (512, 16, 16, 96),
    (1, 512, 512, 128),
    (16, 1024, 1024, 8),
]
QUICK = 6
MINIMUM_BYTES = 256 * 2**20  # rotate through more than any L2 holds


def make_inputs(shape: tuple[int, int, int, int], count: int) -> list[tuple[torch.Tensor, ...]]:
    batch, height, width, channels = shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    grid, d = (batch, height, width), len(DIRECTIONS)
    return [
        (draw(*grid, channels), draw(*grid, d, 1, 3), draw(*grid, d, channels), draw(*grid, d, channels))
        for _ in range(count)
    ]


def time_graph(function: Callable[[], object], replays: int) -> float:
    """Median milliseconds of one replay."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a kernel that streams a large tensor into another.

    An elementwise kernel, since a copy captured in a graph may run on a slower copy engine.
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = time_graph(lambda: torch.neg(source, out=target), 20)
    return 2 * source.numel() * source.element_size() / (milliseconds * 1e-3)


def check(inputs: tuple[torch.Tensor, ...]) -> float:
    """Relative error of the kernel against the float32 reference, on the first batch entry.

    Raises:
        SystemExit: it is not within bfloat16's tolerance.
    """
    from gspn2_diffusion import line_scan

    first = [t[:1] for t in inputs]
    got = line_scan(*first, backend="cupy").float()
    want = line_scan(*(t.float() for t in first), backend="reference")
    error = ((got - want).norm() / want.norm()).item()
    if not error <= 4e-3:
        sys.exit(f"wrong result, not timed: shape {tuple(inputs[0].shape)}, relative error {error:.2e}")
    return error


def measure(shape: tuple[int, int, int, int], bandwidth: float, replays: int) -> dict[str, object]:
    batch, height, width, channels = shape
    pixels, d = batch * height * width, len(DIRECTIONS)
    forward_bytes = 2 * pixels * (channels + d * 3 + 3 * d * channels)  # x, weight, lam, u in; y out
    # dy, x, weight, lam, u, h in; the gradients of x, weight, lam, u out
    backward_bytes = 2 * pixels * (2 * channels + 2 * d * 3 + 6 * d * channels)
    sets = make_inputs(shape, max(1, -(-MINIMUM_BYTES // forward_bytes)))
    error = check(sets[0])
    states = [line_scan_forward(*s, DIRECTIONS, 0, True, True)[1] for s in sets]
    dy = torch.randn_like(states[0])

    def forward() -> None:
        for s in sets:
            line_scan_forward(*s, DIRECTIONS, 0, True, False)

    def backward() -> None:
        for s, state in zip(sets, states, strict=True):
            line_scan_backward(dy, *s, state, DIRECTIONS, 0, True)

    forward_ms = time_graph(forward, replays) / len(sets)
    backward_ms = time_graph(backward, replays) / len(sets)
    return {
        "shape": list(shape),
        "relative_error": error,
        "forward_ms": forward_ms,
        "forward_share_of_copy": forward_bytes / (forward_ms * 1e-3) / bandwidth,
        "backward_ms": backward_ms,
        "backward_share_of_copy": backward_bytes / (backward_ms * 1e-3) / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first cases only, fewer replays")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git history")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = []
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; bfloat16, G=1, four directions")
    print(f"{'B,H,W,C':>20} {'forward ms':>12} {'of copy':>8} {'backward ms':>12} {'of copy':>8}")
    for shape in CASES[:QUICK] if options.quick else CASES:
        row = measure(shape, bandwidth, 20 if options.quick else 100)
        rows.append(row)
        print(
            f"{','.join(map(str, shape)):>20} "
            f"{row['forward_ms']:>12.4f} {row['forward_share_of_copy']:>8.1%} "
            f"{row['backward_ms']:>12.4f} {row['backward_share_of_copy']:>8.1%}"
        )
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = options.out or RESULTS / f"line_scan-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        **describe_environment(),
        **({"commit": options.commit} if options.commit else {}),
        "copy_bytes_per_second": bandwidth,
        "dtype": "bfloat16",
        "cases": rows,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
