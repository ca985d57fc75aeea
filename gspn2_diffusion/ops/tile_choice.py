"""Which tile a tiled launch gets: the one with the lowest time, estimated from measured constants.

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
# of the terms of `cost_terms`, fitted to tiles of 22 shapes measured on an H200 in bfloat16. Clusters of 3, 5
# and 7 were measured beside other work where the pass is backward and there are 512 lines or more, which made
# them slower than they are. benchmarks/tiles.py measures and fits again.
_COST = {
    False: (65.0, 217.0, 560.0, 104.0, 157.0, 12.8, 43.0),
    True: (297.0, 337.0, 895.0, 84.0, 86.3, 28.4, 309.0),
}
# Clusters of a size that are active at once, as a share of the multiprocessors: larger ones leave some idle.
# Those of 3, 5 and 7 were fitted by the choices that they lead to.
_ACTIVE = {1: 1.0, 2: 0.5, 3: 0.28, 4: 0.235, 5: 0.17, 7: 0.1, 8: 0.107, 16: 0.054}
_POWERS = (1, 2, 4, 8, 16)
# Blocks with more positions take longer than estimated, by so much (forward, backward): (1, 512, 512, 128)
# forward 0.54 ms in 3 blocks of 171, 0.41 in 5; (1, 2048, 2048, 48) backward 12.1 ms in 8 of 256, 9.3 in 16.
_MANY_POSITIONS, _TOO_MANY = 128, (1.15, 2.0)
# Forward, threads with 16 bytes take less than estimated where blocks have whole lines and fill most of the
# GPU: (1, 64, 64, 768) and (32, 32, 32, 192) 4 and 5%, but (1, 64, 64, 32) nothing.
_WIDE_VECTORS, _FULL = 0.95, 0.7
# Otherwise much alike, but forward in clusters (1, 135, 240, 144) takes 0.094 instead of 0.101 ms
# with 16 bytes, backward (1, 64, 64, 768) 0.082 instead of 0.087 in whole lines of 32 channels.
_ALIKE = 0.99  # not in clusters of 16: (1, 128, 128, 32) 0.050 instead of 0.045 ms
# Slices of 48 channels (six chunks). Forward in stages of several lines they take less than estimated:
# (1, 256, 256, 144) 0.130 ms, slices of 16 0.149; but (1, 128, 128, 144) 0.058 and 0.051. Backward their
# three or six lanes take more shuffles to sum, which gains only where scattered rows of 32 bytes cost most:
# (1, 512, 512, 144) 1.10 instead of 1.40 ms, (1, 1024, 1024, 144) 4.8 instead of 7.0, (1, 1024, 1024, 48)
# 1.83 instead of 2.5, but (1, 512, 512, 48) 0.69 instead of 0.52; or where few blocks have whole lines:
# (1, 64, 64, 1152) 0.115 instead of 0.122, but (32, 32, 32, 192) 0.152 instead of 0.147.
_SIX_TOGETHER, _LINES_TOGETHER, _LINES_OF_SIX = 0.9, 256, 512
# Backward, slices of one row that several blocks share drift apart by the lines in flight, and the L2 loses
# the row: from so many lines on in stages of one line.
_LINES_OF_ONE = 1024


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
    elements of a line in thousands, 6. its rows in hundreds, of which the accelerator copies one of less
    than 64 bytes no faster, 7. warps whose threads have several positions.
    """
    tile = plan.tile
    assert tile is not None
    blocks = resident_blocks(tile, problem.backward, plan.threads, plan.shared_bytes, shared_limit)
    # Clusters of 3, 5 and 7 were not seen to share multiprocessors with others.
    active = max(1, int(_ACTIVE[tile.cluster] * processors)) * (blocks if tile.cluster in _POWERS else 1)
    times = ceil_div(plan.grid // tile.cluster, active) * problem.chunk_lines
    together = times * min(blocks, ceil_div(plan.grid, processors))
    width = max(plan.widths)
    extended = width + 2 * tile.halo
    row = tile.slice * problem.itemsize
    rows = 2 * extended + (6 if problem.backward else 2) * width
    short = max(1.0, 64 / row)
    if tile.merged:  # half of the scans are over rows, half over columns
        short = (row / 128 + max(1.0, 64 / (row * tile.stage_lines)) / tile.stage_lines) / 2
    return (
        times,
        times / tile.stage_lines,
        times / tile.halo if tile.halo else 0.0,
        times if tile.halo else 0.0,
        together * extended * tile.slice / 1000,
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
    if max(plan.widths) > _MANY_POSITIONS:
        time *= _TOO_MANY[problem.backward]
    tile, forward = plan.tile, not problem.backward
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
        if tile.halo > 4 and (problem.backward or not few):  # (1, 512, 512, 144) forward 0.56 ms, with 4 0.44
            return True
        most = 2 * tile.slice > problem.channels and problem.lines < _LINES_OF_ONE
        if problem.backward and (few or most) and (tile.cluster > 1 or crowded):
            return True
    shared = problem.lines >= _LINES_OF_ONE and tile.slice < problem.channels
    return problem.backward and shared and tile.stage_lines > 1


def choose_tile(problem: Problem, clusters: Sequence[int], shared_limit: int, processors: int) -> Tile | None:
    """The tile with the lowest :func:`estimate`, or None where no tiled kernel fits."""
    best, best_time = None, math.inf
    for tile in tiles(problem, clusters):
        plan = tiled_plan(problem, tile, True, shared_limit)
        if plan is not None and (time := estimate(problem, plan, shared_limit, processors)) < best_time:
            best, best_time = tile, time
    return best
