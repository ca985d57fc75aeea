"""The local perception unit against cuDNN: benchmarks/results/local_perception-<gpu>.json, half a minute.

    python benchmarks/local_perception.py

Forward passes are CUDA-graph replays, both passes together are eager calls between device events; every
case is compared with the plain-torch form. ``copy`` is what reading x and writing y once would take at the
copy bandwidth that was measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_bandwidth, time_graph, write_result

from gspn2_diffusion.ops.local_perception import local_perception

CASES = [  # (B, H, W, C)
    (1, 64, 64, 1152),
    (1, 128, 128, 1152),
    (1, 256, 256, 1152),
    (1, 512, 512, 384),
    (32, 16, 16, 384),
    (512, 16, 16, 384),
]


def time_training(run: Callable[[], torch.Tensor], repeats: int = 20) -> float:
    """Median milliseconds of a forward and a backward pass."""
    times = []
    for number in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run().backward(retain_graph=False)
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(shape: tuple[int, int, int, int], bandwidth: float) -> dict[str, object]:
    """One case: milliseconds of the kernel and of plain torch."""
    channels = shape[-1]
    x = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(channels, 1, 3, 3, device="cuda")).bfloat16().requires_grad_()
    bias = torch.randn(channels, device="cuda").bfloat16().requires_grad_()
    dy = torch.randn(shape, device="cuda").bfloat16()
    row: dict[str, object] = {"shape": shape, "copy_ms": 2e3 * x.numel() * x.element_size() / bandwidth}
    results = {}
    for backend in ("cupy", "reference"):

        def forward(backend: str = backend) -> torch.Tensor:
            return local_perception(x, weight, bias, backend=backend)

        def training(backend: str = backend) -> torch.Tensor:
            return (forward(backend) * dy).sum()

        results[backend] = forward().detach().float()
        with torch.no_grad():
            row[f"{backend}_forward_ms"] = time_graph(forward, 20)
        row[f"{backend}_both_ms"] = time_training(training)
    error = (results["cupy"] - results["reference"]).norm() / results["reference"].norm()
    if not error < 1e-2:
        sys.exit(f"{shape}: the kernel differs from plain torch by {error.item():.1e}")
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
    for shape in CASES:
        rows.append(measure(shape, bandwidth))
        print({name: round(v, 4) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    path = write_result(
        {"copy_bandwidth": bandwidth, "rows": rows}, options.out, "local_perception", options.commit
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
