"""Runs every kernel on the shapes of the tests; meant to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python3 scripts/sanitize_kernels.py

Without torch's caching allocator every tensor is an allocation of its own, so an access outside it is seen.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gspn2_diffusion.ops import (
    ada_layer_norm_kernels,
    cupy_backend,
    local_perception_kernels,
    scan_kernels,
)
from gspn2_diffusion.ops.plane_plans import PlaneTile, plane_plan
from gspn2_diffusion.ops.plans import Problem, Tile, tiled_plan

SHAPES = [(1, 1), (1, 7), (7, 1), (33, 65), (64, 64), (1023, 17), (1100, 40)]
CHANNELS = [(1, 1), (5, 1), (40, 1), (48, 1), (16, 2), (8, 8)]  # (C, G)
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
    y, state = scan_kernels.line_scan_forward(x, weight, lam, gate, *options, True)
    kept = y if state is None else state
    scan_kernels.line_scan_backward(dy, x, weight, lam, gate, kept, *options)


# (H, W), channels, tile: the kinds of launch that small pictures do not get by themselves.
TILES: list[tuple[tuple[int, int], int, Tile]] = [
    ((33, 65), 48, Tile(8, 3, 16, 1, 0, 1)),
    ((61, 90), 32, Tile(4, 1, 16, 2, 8, 4)),
    ((61, 90), 32, Tile(8, 3, 32, 2, 4, 2)),
    ((130, 97), 16, Tile(8, 1, 16, 4, 4, 2)),
    ((130, 97), 32, Tile(8, 1, 32, 7, 2, 2)),
    ((150, 190), 64, Tile(8, 1, 32, 8, 8, 2)),
    ((310, 318), 16, Tile(8, 1, 16, 16, 8, 2)),
    ((61, 90), 72, Tile(4, 1, 32, 2, 8, 2)),
    ((150, 190), 48, Tile(8, 1, 48, 8, 8, 1)),
    ((300, 17), 24, Tile(8, 3, 16, 1, 0, 1)),
    ((27, 24), 8, Tile(8, 1, 8, 2, 8, 2, merged=True)),
    ((40, 64), 16, Tile(4, 1, 16, 1, 0, 4, merged=True)),
    ((560, 520), 8, Tile(8, 1, 8, 8, 8, 2, merged=True)),  # dW by parts of all directions
]
PLANES = [((40, 136), PlaneTile(1)), ((260, 264), PlaneTile(2))]  # (H, W) of one channel, tile


def run_tile(size: tuple[int, int], channels: int, tile: Tile) -> None:
    """A forward and a backward launch with a given tile."""
    grid, d = (1, *size), len(DIRECTIONS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    limit = cupy_backend.shared_limit(torch.cuda.current_device())
    weight, lam, u, dy = (draw(d, *grid, *shape).movedim(0, 3) for shape in ((1, 3), *[(channels,)] * 3))
    inputs = (draw(*grid, channels), weight, lam, u)
    facts = (*grid, channels, 1, tuple(DIRECTIONS), 0, 2)
    problems = [Problem(*facts, backward, touching=True) for backward in (False, True)]
    plans = [tiled_plan(problem, tile, True, limit) for problem in problems]
    assert None not in plans, tile
    options = (DIRECTIONS, 0, True)
    _, state = scan_kernels.line_scan_forward(*inputs, *options, True, plan=plans[0])
    assert state is not None
    scan_kernels.line_scan_backward(dy, *inputs, state, *options, plan=plans[1])


def run_plane(size: tuple[int, int], tile: PlaneTile) -> None:
    """A forward and a backward launch of one channel, the directions outermost in memory."""
    grid, d = (1, *size), len(DIRECTIONS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    limit = cupy_backend.shared_limit(torch.cuda.current_device())
    problems = [Problem(*grid, 1, 1, tuple(DIRECTIONS), 0, 2, backward) for backward in (False, True)]
    plans = [plane_plan(problem, tile, True, limit) for problem in problems]
    assert None not in plans, tile
    weight = draw(d, *grid, 1, 3).movedim(0, 3)
    lam, u, dy = (draw(d, *grid, 1).movedim(0, 3) for _ in range(3))
    x, options = draw(*grid, 1), (DIRECTIONS, 0, True)
    _, state = scan_kernels.line_scan_forward(x, weight, lam, u, *options, True, plan=plans[0])
    assert state is not None
    scan_kernels.line_scan_backward(dy, x, weight, lam, u, state, *options, plan=plans[1])


def run_local_perception(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    """The convolution and all its gradients."""
    x, dy = (torch.randn(2, *size, channels, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(channels, 1, 3, 3, device="cuda")
    bias = torch.randn(channels, device="cuda")
    local_perception_kernels.convolve(x, weight, bias)
    local_perception_kernels.gradients(dy, x, weight, bias, (True, True, True))


def run_norm(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    """The modulated norm and all its gradients."""
    x = torch.randn(2, size[0] * size[1], channels, device="cuda", dtype=dtype)
    shift, scale = (torch.randn(2, 1, channels, device="cuda") for _ in range(2))
    y, stats = ada_layer_norm_kernels.normalise(x, shift, scale, 1e-6, dtype, True)
    assert stats is not None
    ada_layer_norm_kernels.gradients(y, x, shift, scale, stats, (True, True, True))


def launches(options: argparse.Namespace, clusters: Sequence[int]) -> list[tuple[str, Callable[[], None]]]:
    """What the options ask for: names, and what runs the kernels."""
    shapes = SHAPES[:-2] if options.small else SHAPES[-2:] if options.tall else SHAPES
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    found: list[tuple[str, Callable[[], None]]] = []

    def add(run: Callable[..., None], *arguments: Any) -> None:
        found.append((f"{run.__name__}{arguments}", functools.partial(run, *arguments)))

    channels = [each for each in CHANNELS if not options.channels or each[0] in options.channels]
    if not options.tiles and not options.blocks:
        cases = itertools.product(shapes, channels, CHUNKS, dtypes)
        for index, (size, (count, groups), chunk_size, dtype) in enumerate(cases):
            add(run_case, size, count, groups, chunk_size, dtype, index % 2 == 0)
    if not options.tiles:
        for size, count, dtype in itertools.product(shapes, (3, 40, 132), dtypes):
            add(run_local_perception, size, count, dtype)
        for size, count, dtype in itertools.product(shapes, (20, 1156), dtypes):
            add(run_norm, size, count, dtype)
    if not options.tall and not options.blocks:
        for tiled in TILES:
            if tiled[-1].cluster in clusters:
                add(run_tile, *tiled)
        for plane in PLANES:
            if plane[-1].cluster in clusters:
                add(run_plane, *plane)
    return found


def parse_share(text: str) -> tuple[int, int]:
    """``"2/3"`` as numbers.

    Raises:
        argparse.ArgumentTypeError: it is no share.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 <= K <= N, such as 2/3")
    return int(part), int(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="leave out the two tall shapes")
    parser.add_argument("--tall", action="store_true", help="only the two tall shapes")
    parser.add_argument("--tiles", action="store_true", help="only the tiles that are asked for by name")
    parser.add_argument("--blocks", action="store_true", help="only local perception and modulated norm")
    parser.add_argument("--channels", type=int, nargs="+", help="only shapes with so many channels")
    parser.add_argument(
        "--share", type=parse_share, default=(1, 1), help="K/N: every N-th launch, from the K-th"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA GPU")
    part, parts = options.share
    chosen = launches(options, cupy_backend.clusters(torch.cuda.current_device()))[part - 1 :: parts]
    for index, (name, run) in enumerate(chosen, 1):
        run()
        torch.cuda.synchronize()
        if index % 10 == 0 or index == len(chosen):
            print(f"{index} of {len(chosen)}, the last {name}", flush=True)


if __name__ == "__main__":
    main()
