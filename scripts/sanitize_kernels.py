"""Runs every line-scan kernel on the shapes of the tests; meant to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python3 scripts/sanitize_kernels.py

Without torch's caching allocator every tensor is an allocation of its own, so an access outside it is seen.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from gspn2_diffusion.ops import cupy_backend

SHAPES = [(1, 1), (1, 7), (7, 1), (33, 65), (64, 64), (1023, 17), (1100, 40)]
CHANNELS = [(1, 1), (5, 1), (48, 1), (16, 2), (8, 8)]  # (C, G)
CHUNKS = [0, 3]
DIRECTIONS = [0, 1, 2, 3]


def run_case(
    size: tuple[int, int], channels: int, groups: int, chunk_size: int, dtype: torch.dtype, with_u: bool
) -> None:
    """One forward and one backward launch, straight through the backend."""
    grid, d = (2, *size), len(DIRECTIONS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    x, weight = draw(*grid, channels), draw(*grid, d, groups, 3)
    lam, u, dy = (draw(*grid, d, channels) for _ in range(3))
    options = (DIRECTIONS, chunk_size, True)
    gate = u if with_u else None
    y, state = cupy_backend.line_scan_forward(x, weight, lam, gate, *options, True)
    cupy_backend.line_scan_backward(dy, x, weight, lam, gate, state if with_u else y, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="leave out the two tall shapes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA GPU")
    shapes = SHAPES[:-2] if options.small else SHAPES
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = list(itertools.product(shapes, CHANNELS, CHUNKS, dtypes))
    for index, (size, (channels, groups), chunk_size, dtype) in enumerate(cases):
        run_case(size, channels, groups, chunk_size, dtype, with_u=index % 2 == 0)
    torch.cuda.synchronize()
    print(f"ran {len(cases)} cases")


if __name__ == "__main__":
    main()
