"""Launches of the plane kernels: scans of one channel whose rows lie in one piece. See ``cuda/plane.cuh``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gspn2_diffusion.ops.plans import Plan, Problem, ceil_div, check_grid

RUN = 4  # positions of a lane, elements of its vectors
STAGES = 2  # as in cuda/plane.cuh
SPAN = 32 * RUN  # positions of a warp
MAX_WARPS = {False: 9, True: 6}  # of a block, by whether backward: KERNEL_THREADS of the kernels
FEW_WARPS = 4  # of a block; two blocks of more do not fit a multiprocessor of an H200
CLUSTERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class PlaneTile:
    """The one choice of a launch: how many blocks share a line."""

    cluster: int


def shared_bytes(warps: int, backward: bool) -> int:
    """Shared memory of a block: ``struct PlaneMemory`` in ``cuda/plane.cuh``."""
    vectors = 8 if backward else 6  # elements of a pixel: x, lam, u, three coefficients; dy and the state
    extra = 32 * 16 + 2 * 32 if backward else 0
    return warps * (STAGES * (vectors * 16 * SPAN + extra) + 4 * RUN * 4 + 32)


def fits_planes(
    problem: Problem, strides: Sequence[tuple[int, ...]], weight: tuple[int, ...], alignment: int
) -> bool:
    """Whether the plane kernels take a problem and its layouts.

    Args:
        strides: of each tensor but the weights, of all dimensions but the last.
        weight: strides of ``(B, H, W, D, G, 3)``.
        alignment: all addresses modulo 16, combined by bitwise or.
    """
    columns = 16 // problem.itemsize
    sides = (problem.width, problem.chunk)
    if problem.channels != 1 or any(n % columns for n in sides) or problem.height % RUN or alignment:
        return False
    sizes = (problem.batch, problem.height, problem.width, len(problem.directions))
    for pixel, each in ((3, weight), *((1, one) for one in strides)):
        rows = [s for s, n, axis in zip(each, sizes, range(4), strict=False) if n > 1 and axis != 2]
        if each[2] != pixel or any(s % columns for s in rows):
            return False
    return True


def plane_tiles(problem: Problem, clusters: Sequence[int] = CLUSTERS) -> list[PlaneTile]:
    """Every choice worth trying: those with no block that has nothing to do."""
    longest = problem.line_lengths[-1]
    tiles = []
    for cluster in clusters:
        warps = ceil_div(longest, cluster * SPAN)
        if cluster == 1 or (cluster - 1) * warps * SPAN < longest:
            tiles.append(PlaneTile(cluster))
    return tiles


def choose_plane_tile(
    problem: Problem, clusters: Sequence[int], shared_limit: int, processors: int
) -> PlaneTile | None:
    """The fewest blocks that hold a line, of up to `FEW_WARPS` warps if there are such; None where none can.

    Forward at 64 x 1024 x 1024, one, two, four and eight blocks for a line took 3.2, 3.1, 4.8 and 6.5 ms on
    an H200; backward, two, four and eight took 10.0, 11.2 and 14.5 ms.
    """
    fitting = []
    for tile in plane_tiles(problem, [n for n in clusters if n in CLUSTERS]):
        plan = plane_plan(problem, tile, True, shared_limit)
        if plan is not None:
            fitting.append((plan.threads > 32 * FEW_WARPS, tile.cluster, tile))
    return min(fitting)[-1] if fitting else None


def plane_plan(problem: Problem, tile: PlaneTile, normalize: bool, shared_limit: int) -> Plan | None:
    """The launch of a problem that :func:`fits_planes`, or None where the blocks cannot hold a line."""
    if problem.channels != 1:
        return None
    cluster = tile.cluster
    warps = ceil_div(problem.line_lengths[-1], cluster * SPAN)
    shared = shared_bytes(warps, problem.backward)
    if warps > MAX_WARPS[problem.backward] or shared > shared_limit:
        return None
    chunks = ceil_div(problem.lines, problem.chunk_lines)
    grid = cluster * chunks * len(problem.directions) * problem.batch
    check_grid(grid, problem)
    source = "line_scan_backward_plane" if problem.backward else "line_scan_forward_plane"
    return Plan(
        source=source,
        entry=f"{source}_{cluster}",
        blocks=cluster,
        vec=RUN,
        run=RUN,
        grid=grid,
        threads=32 * warps,
        shared_bytes=shared,
        parameters=(*problem.shape, problem.chunk_lines, chunks, warps, int(normalize)),
    )
