"""What surrounds the mixer in a block, against plain torch: benchmarks/results/block_kernels-<gpu>.json.

    python benchmarks/block_kernels.py          half a minute

The local perception unit (cuDNN's depthwise convolution and a sum) and the modulated layer norm. Forward
passes are CUDA-graph replays, both passes together eager calls between device events; every case is compared
with plain torch. ``copy`` is what reading x and writing y once would take at the copy bandwidth that was
measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_bandwidth, time_graph, write_result

from gspn2_diffusion.ops.ada_layer_norm import ada_layer_norm
from gspn2_diffusion.ops.local_perception import local_perception

Forward = Callable[[str], torch.Tensor]  # of a backend
Case = tuple[int, int, int, int]  # B, H, W, C
CASES: list[Case] = [
    (1, 64, 64, 1152),
    (1, 128, 128, 1152),
    (1, 256, 256, 1152),
    (1, 512, 512, 384),
    (32, 16, 16, 384),
    (512, 16, 16, 384),
]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").bfloat16().requires_grad_()


def perception(shape: Case) -> Forward:
    """The local perception unit on random pictures."""
    x, weight, bias = draw(*shape), draw(shape[-1], 1, 3, 3), draw(shape[-1])
    return lambda backend: local_perception(x, weight, bias, backend=backend)


def norm(shape: Case) -> Forward:
    """The modulated norm of their tokens."""
    batch, height, width, channels = shape
    x, shift, scale = (
        draw(batch, height * width, channels),
        draw(batch, 1, channels),
        draw(batch, 1, channels),
    )
    return lambda backend: ada_layer_norm(x, shift, scale, backend=backend)


def time_training(forward: Callable[[], torch.Tensor], repeats: int = 20) -> float:
    """Median milliseconds of a forward and a backward pass."""
    dy = torch.randn_like(forward())
    times = []
    for number in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        forward().backward(dy)
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(name: str, shape: Case, forward: Forward, bandwidth: float) -> dict[str, object]:
    """One case: milliseconds of the kernel and of plain torch."""
    results = {backend: forward(backend).detach().float() for backend in ("cupy", "reference")}
    error = ((results["cupy"] - results["reference"]).norm() / results["reference"].norm()).item()
    if not error < 1e-2:
        sys.exit(f"{name} {shape}: the kernel differs from plain torch by {error:.1e}")
    row: dict[str, object] = {"kernel": name, "shape": shape}
    row["copy_ms"] = 2e3 * 2 * results["cupy"].numel() / bandwidth
    for backend in results:
        with torch.no_grad():
            row[f"{backend}_forward_ms"] = time_graph(lambda backend=backend: forward(backend), 20)  # type: ignore[misc]
        row[f"{backend}_both_ms"] = time_training(lambda backend=backend: forward(backend))  # type: ignore[misc]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    bandwidth, rows = copy_bandwidth(), []
    for name, make in (("local perception", perception), ("modulated norm", norm)):
        for shape in CASES:
            rows.append(measure(name, shape, make(shape), bandwidth))
            shown = {key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}
            print(shown, flush=True)
    result = {"copy_bandwidth": bandwidth, "rows": rows}
    print(f"wrote {write_result(result, options.out, 'block_kernels', options.commit)}")


if __name__ == "__main__":
    main()
