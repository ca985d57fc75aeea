"""Which tile a tiled launch gets: one that was measured, or the one with the lowest estimated time.

Plain arithmetic, without torch or a GPU. ``benchmarks/tiles.py`` measures tiles and fits the constants again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gspn2_diffusion.ops.plans import (
    HELPERS,
    RUNS,
    Plan,
    Problem,
    Tile,
    ceil_div,
    may_merge,
    resident_blocks,
    tiled_plan,
)

# Which tile: the one with the lowest estimated time. Nanoseconds for one line of one wave of blocks, for each
# of the terms of `cost_terms`, chosen so that the tiles they lead to are as quick as they can be, at 23
# shapes of which most tiles were measured on an H200 in bfloat16 (benchmarks/tiles.py).
_COST = {
    False: (1.3, 10.8, 1043.0, 62.4, 185.0, 17.2, 1.4),
    True: (228.2, 0.4, 641.3, 249.1, 208.5, 41.0, 52.6),
}
# A cluster stays within a group of multiprocessors. 132 of them as seven groups of 18 and one of 6 have as
# many clusters active at once as were found: 7 of 16 blocks, 14 of 8, 22 of 5.
_GROUP = 18
_SCHEDULERS = 4  # of a multiprocessor
# Backward, blocks with more positions take longer than estimated: (1, 2048, 2048, 48) 12.1 ms in 8 blocks of
# 256, 9.3 in 16.
_MANY_POSITIONS, _TOO_MANY = 128, 1.55
# Forward, threads with 16 bytes take less than estimated where blocks have whole lines and fill most of the
# GPU: (1, 64, 64, 768) and (32, 32, 32, 192) 4 and 5%, but (1, 64, 64, 32) nothing.
_WIDE_VECTORS, _FULL = 0.77, 0.7
# Otherwise much alike, but forward in clusters (1, 135, 240, 144) takes 0.094 instead of 0.101 ms with 16
# bytes; not in those of 16: (1, 128, 128, 32) 0.050 instead of 0.045. Backward (1, 64, 64, 768) 0.079 instead
# of 0.083 in whole lines of 32 channels.
_ALIKE = 0.998
# Slices of 48 channels (six chunks). Forward in stages of several lines they take less than estimated:
# (1, 256, 256, 144) 0.130 ms, slices of 16 0.149; but (1, 128, 128, 144) 0.058 and 0.051. Backward their
# three or six lanes take more shuffles to sum, which gains only where scattered rows of 32 bytes cost most:
# (1, 512, 512, 144) 1.10 instead of 1.40 ms, (1, 1024, 1024, 144) 4.8 instead of 7.0, (1, 1024, 1024, 48)
# 1.83 instead of 2.5, but (1, 512, 512, 48) 0.69 instead of 0.52; or where few blocks have whole lines:
# (1, 64, 64, 1152) 0.115 instead of 0.122, but (32, 32, 32, 192) 0.152 instead of 0.147.
_SIX_TOGETHER, _LINES_TOGETHER, _LINES_OF_SIX = 0.92, 256, 512
# Backward, slices of one row that several blocks share drift apart by the lines in flight, and the L2 loses
# the row: from so many lines on in stages of one line.
_LINES_OF_ONE = 1024
# Where the estimate leads to a slower one: tiles that were the quickest there, or within 2% of it, on an H200
# in bfloat16, with the kernels of the time.
MEASURED = {
    False: {  # (B, H, W, C): tile  ms, instead of what the estimate leads to
        (1, 128, 128, 32): Tile(4, 1, 16, 8, 8, 4),  # 0.0361, 0.0395
        (1, 128, 128, 144): Tile(4, 1, 16, 3, 8, 4),  # 0.0460, 0.0494
        (1, 256, 256, 64): Tile(4, 1, 16, 5, 8, 4),  # 0.0863, 0.0985
        (8, 256, 256, 64): Tile(8, 1, 64, 7, 2, 1),  # 0.339, 0.394
        (1, 135, 240, 144): Tile(4, 1, 16, 3, 8, 4),  # 0.0891, 0.0926
        (32, 32, 32, 192): Tile(8, 1, 64, 1, 0, 2),  # 0.0549, 0.0565
        (32, 74, 74, 64): Tile(4, 1, 32, 1, 0, 4),  # 0.0976, 0.1007
        (1, 512, 512, 128): Tile(8, 1, 32, 16, 4, 2),  # 0.376, 0.497
        (1, 1024, 1024, 48): Tile(8, 1, 48, 16, 4, 2),  # 0.773, 0.845
        (1, 1024, 1024, 144): Tile(8, 3, 48, 7, 4, 1),  # 2.11, 2.17
        (1, 2048, 2048, 48): Tile(8, 3, 48, 16, 4, 1),  # 2.97, 5.00
    },
    True: {
        (1, 64, 64, 32): Tile(4, 1, 8, 1, 0, 4),  # 0.0429, 0.0449
        (1, 64, 64, 144): Tile(4, 1, 8, 1, 0, 4),  # 0.0460, 0.0510
        (1, 64, 64, 1152): Tile(8, 1, 48, 1, 0, 1),  # 0.108, 0.132
        (1, 128, 128, 32): Tile(4, 1, 16, 8, 8, 4),  # 0.0853, 0.0906
        (1, 256, 256, 64): Tile(4, 1, 16, 5, 8, 4),  # 0.208, 0.242
        (1, 256, 256, 144): Tile(8, 1, 48, 8, 4, 4),  # 0.288, 0.513
        (8, 256, 256, 64): Tile(8, 1, 64, 5, 4, 1),  # 0.890, 1.066
        (32, 74, 74, 64): Tile(8, 1, 64, 2, 4, 2),  # 0.256, 0.264
        (1, 512, 512, 48): Tile(4, 1, 16, 8, 8, 2),  # 0.456, 0.537
        (1, 512, 512, 144): Tile(8, 3, 48, 8, 8, 2),  # 1.14, 1.36
        (16, 1024, 1024, 8): Tile(4, 1, 8, 5, 8, 2, merged=True),  # 4.84, 4.92
        (1, 2048, 2048, 48): Tile(4, 1, 16, 16, 4, 1),  # 9.45, 10.3
        (1, 4096, 4096, 48): Tile(8, 1, 16, 16, 4, 1),  # 47.2, 49.9
    },
}
_MEASURED_ON = 132  # multiprocessors


_CHUNKS = (1, 2, 4, 8, 6)  # of 16 bytes in a row; those of 48 bytes straddle the sectors of memory
_SHORT_ROW = 4  # below so many chunks the accelerator copies a row no faster than one of 64 bytes


def tiles(problem: Problem, clusters: Sequence[int] = (1, 2, 3, 4, 5, 7, 8, 16)) -> Iterator[Tile]:
    """Every tile choice worth trying; :func:`tiled_plan` sorts out those that fit.

    Where only short rows divide the channels, as with 280, also longer ones of which the last overhangs; it
    takes the accelerator, which comes with clusters.
    """
    chunk = 16 // problem.itemsize
    exact = [size for size in _CHUNKS if problem.per_group % (size * chunk) == 0]
    overhang = len(clusters) > 1 and 0 < max(exact, default=0) < _SHORT_ROW
    for size, (vec, run), cluster in itertools.product(_CHUNKS if overhang else exact, RUNS, clusters):
        for stage_lines, halo in itertools.product((1, 2, 4), (0,) if cluster == 1 else (2, 4, 8)):
            tile = Tile(vec * 2 // problem.itemsize, run, size * chunk, cluster, halo, stage_lines)
            merged = replace(tile, merged=True)
            may = size < _SHORT_ROW and len(clusters) > 1
            yield merged if may and may_merge(problem, merged) else tile


def cost_terms(problem: Problem, plan: Plan, shared_limit: int, processors: int) -> tuple[float, ...]:
    """What the time of a tiled launch is made of, each times its lines and waves of blocks.

    1. the dependent instructions of a line, 2. what a stage costs beside its lines, 3. the barrier of a
    cluster, 4. what a cluster costs at every line; and times the blocks on a multiprocessor: 5. the
    elements of a line in thousands (backward with those of idle threads, as if every scheduler had as many
    warps as the one with most), 6. its rows in hundreds, of which the accelerator copies one of less
    than 64 bytes no faster, 7. warps whose threads have several positions.
    """
    tile = plan.tile
    assert tile is not None
    blocks = resident_blocks(tile, problem.backward, plan.threads, plan.shared_bytes, shared_limit)
    groups, rest = divmod(processors, _GROUP)
    active = max(1, groups * (_GROUP * blocks // tile.cluster) + rest * blocks // tile.cluster)
    times = ceil_div(plan.grid // tile.cluster, active) * problem.chunk_lines
    on_one = min(blocks, ceil_div(plan.grid, processors))
    together = times * on_one
    width = max(plan.widths)
    extended = width + 2 * tile.halo
    row = tile.slice * problem.itemsize
    rows = 2 * extended + (6 if problem.backward else 2) * width
    short = max(1.0, 64 / row)
    if tile.merged:  # half of the scans are over rows, half over columns
        short = (row / 128 + max(1.0, 64 / (row * tile.stage_lines)) / tile.stage_lines) / 2
    elements = together * extended * tile.slice
    if problem.backward:
        warps = ceil_div(on_one * (plan.threads - HELPERS) // 32, _SCHEDULERS) * _SCHEDULERS
        elements = times * warps * 32 * tile.vec * tile.run
    return (
        times,
        times / tile.stage_lines,
        times / tile.halo if tile.halo else 0.0,
        times if tile.halo else 0.0,
        elements / 1000,
        together * rows / 100 * short,
        together * (plan.threads - HELPERS) / 32 if tile.run > 1 else 0.0,
    )


def estimate(problem: Problem, plan: Plan, shared_limit: int, processors: int) -> float:
    """Estimated nanoseconds of a tiled launch; infinite for one that is known to be poor."""
    assert plan.tile is not None
    if known_to_be_poor(problem, plan.tile, plan.grid > processors):
        return math.inf
    terms = cost_terms(problem, plan, shared_limit, processors)
    time = sum(c * t for c, t in zip(_COST[problem.backward], terms, strict=True))
    tile, forward = plan.tile, not problem.backward
    if not forward and max(plan.widths) > _MANY_POSITIONS:
        time *= _TOO_MANY
    if tile.run == 1 and tile.vec * problem.itemsize == 16:
        if forward and tile.cluster == 1 and plan.grid > _FULL * processors:
            time *= _WIDE_VECTORS
        elif 1 < tile.cluster <= 8 if forward else tile.cluster == 1 and tile.slice >= 32:
            time *= _ALIKE
    large = min(problem.height, problem.width) >= _LINES_TOGETHER
    if forward and large and tile.cluster > 1 and tile.stage_lines > 1 and _of_six(tile):
        time *= _SIX_TOGETHER
    return time


def _of_six(tile: Tile) -> bool:
    """Whether a position has three times a power of two of threads."""
    return tile.slice // tile.vec % 3 == 0


def known_to_be_poor(problem: Problem, tile: Tile, crowded: bool) -> bool:
    """Whether measurements rule a tile out that the estimate would favour; one of its kind always stays.

    Args:
        crowded: there are more blocks than multiprocessors.
    """
    if _of_six(tile):
        few = min(problem.height, problem.width) < _LINES_OF_SIX
        # (1, 512, 512, 144) forward took 0.56 ms with exchanges every 8 lines, 0.44 every 4.
        if tile.halo > 4 and tile.run == 1 and (problem.backward or not few):
            return True
        most = 2 * tile.slice > problem.channels and problem.lines < _LINES_OF_ONE
        # (1, 256, 256, 144) backward took 0.29 ms in clusters of 8 of these, 0.40 to 0.51 in others.
        short = min(problem.height, problem.width) < _LINES_TOGETHER
        together = tile.cluster > 1 and (short or most)
        if problem.backward and (few or most) and (together or crowded):
            return True
    shared = problem.lines >= _LINES_OF_ONE and tile.slice < problem.channels
    return problem.backward and shared and tile.stage_lines > 1


def measured_tile(problem: Problem, clusters: Sequence[int], processors: int) -> Tile | None:
    """What was found to be quicker than the estimate's tile, on a GPU with as many multiprocessors."""
    alike = (
        problem.groups == 1 and problem.itemsize == 2 and not problem.chunk and len(problem.directions) == 4
    )
    shape = (problem.batch, problem.height, problem.width, problem.channels)
    tile = MEASURED[problem.backward].get(shape) if alike and processors == _MEASURED_ON else None
    return tile if tile is not None and tile.cluster in clusters else None


def choose_tile(problem: Problem, clusters: Sequence[int], shared_limit: int, processors: int) -> Tile | None:
    """The quickest tile that was measured, or that with the lowest :func:`estimate`.

    None where no tiled kernel fits.
    """
    measured = measured_tile(problem, clusters, processors)
    if measured is not None and tiled_plan(problem, measured, True, shared_limit) is not None:
        return measured
    best, best_time = None, math.inf
    for tile in tiles(problem, clusters):
        plan = tiled_plan(problem, tile, True, shared_limit)
        if plan is not None and (time := estimate(problem, plan, shared_limit, processors)) < best_time:
            best, best_time = tile, time
    return best
