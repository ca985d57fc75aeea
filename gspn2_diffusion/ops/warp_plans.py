"""Launches of the warp kernels: how a scan is spread over warps. See ``cuda/warp.cuh``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gspn2_diffusion.ops.plans import Plan, Problem, ceil_div, check_grid

STAGES = 4  # as in cuda/warp.cuh
CLUSTERS = (1, 2, 4, 8)
LANES = (1, 2, 4, 6, 8, 12)  # rows of whole sectors of 32 bytes, but for the first
LINES = {8: 4, 16: 2, 32: 1, 64: 1}  # of a stage, by the bytes that a lane copies of a line of one tensor
# Channels and positions of a lane, by the bytes of an element and whether it is the backward kernel.
WARP_RUNS = {
    (2, False): ((4, 1), (8, 1), (8, 2), (8, 4)),
    (2, True): ((4, 1), (8, 1), (8, 2)),
    (4, False): ((4, 1), (4, 2), (4, 4)),
    (4, True): ((4, 1), (4, 2)),
}


@dataclass(frozen=True)
class WarpTile:
    """Choices of a launch; see ``struct Tiling`` in ``cuda/warp.cuh``.

    Attributes:
        vec, run: channels and positions of a lane.
        lanes: of a position.
        channel_warps, position_warps: of a block.
        cluster: blocks that share a line.
    """

    vec: int
    run: int
    lanes: int
    channel_warps: int
    position_warps: int
    cluster: int

    @property
    def slice(self) -> int:
        """Channels of a warp."""
        return self.vec * self.lanes

    @property
    def span(self) -> int:
        """Positions of a warp."""
        return 32 // self.lanes * self.run

    @property
    def max_threads(self) -> int:
        """Threads that a block may have, as registers allow: ``WARP_THREADS``."""
        return 640 if self.vec * self.run <= 4 else {1: 512, 2: 384, 4: 256}[self.run]


def shared_bytes(problem: Problem, tile: WarpTile) -> int:
    """Shared memory of a block: ``struct Memory`` in ``cuda/warp.cuh``."""
    lines = LINES[tile.vec * tile.run * problem.itemsize]
    slots = 5 * tile.run + 1 if problem.backward else 3 * tile.run
    ring = STAGES * lines * slots * 32 * tile.vec * problem.itemsize
    raw = 16 if problem.itemsize == 4 else 8
    weights = lines * tile.span * (STAGES * raw + 2 * 16)
    return tile.channel_warps * tile.position_warps * (ring + weights + 16 * tile.slice + 32)


def warp_plan(problem: Problem, tile: WarpTile, normalize: bool, shared_limit: int) -> Plan | None:
    """The launch of one tile choice, or None where it does not fit the problem or the GPU."""
    if (tile.vec, tile.run) not in WARP_RUNS[problem.itemsize, problem.backward]:
        return None
    if problem.per_group % tile.slice or problem.channels % (tile.slice * tile.channel_warps):
        return None
    warps = tile.channel_warps * tile.position_warps
    shared = shared_bytes(problem, tile)
    reach = tile.cluster * tile.position_warps * tile.span
    if reach < problem.line_lengths[-1] or 32 * warps > tile.max_threads or shared > shared_limit:
        return None
    slices = problem.channels // (tile.slice * tile.channel_warps)
    chunks = ceil_div(problem.lines, problem.chunk_lines)
    grid = tile.cluster * slices * chunks * len(problem.directions) * problem.batch
    check_grid(grid, problem)
    source = "line_scan_backward_warp" if problem.backward else "line_scan_forward_warp"
    return Plan(
        source=source,
        entry=f"{source}_{tile.cluster}",
        vec=tile.vec,
        run=tile.run,
        grid=grid,
        threads=32 * warps,
        shared_bytes=shared,
        parameters=(
            *problem.shape,
            problem.chunk_lines,
            chunks,
            tile.lanes,
            tile.channel_warps,
            tile.position_warps,
            slices,
            int(normalize),
        ),
        channel_slices=problem.per_group // tile.slice,
    )


def warp_tiles(problem: Problem, clusters: Sequence[int] = CLUSTERS) -> Iterator[WarpTile]:
    """Every tile choice worth trying; :func:`warp_plan` sorts out those that do not fit.

    A line is cut into no more warps than it has need of, evenly over the blocks of a cluster.
    """
    longest = problem.line_lengths[-1]
    runs = WARP_RUNS[problem.itemsize, problem.backward]
    for (vec, run), lanes, cluster in itertools.product(runs, LANES, clusters):
        if vec * lanes * problem.itemsize < 16:
            continue
        tile = WarpTile(vec, run, lanes, 1, 1, cluster)
        position_warps = ceil_div(longest, cluster * tile.span)
        if cluster > 1 and (cluster - 1) * position_warps * tile.span >= longest:
            continue  # the last block would have nothing to do
        most = tile.max_threads // 32 // position_warps
        columns = problem.channels // tile.slice
        for channel_warps in range(1, min(most, columns) + 1):
            if columns % channel_warps == 0:
                yield WarpTile(vec, run, lanes, channel_warps, position_warps, cluster)


# Instructions of a line and registers of a thread, by whether it is the backward kernel and by the channels
# (of two bytes) and positions of a lane: counted in the machine code for sm_90.
_INSTRUCTIONS = {
    **{(False, 4, 1): 170, (False, 8, 1): 230, (False, 8, 2): 400, (False, 8, 4): 740},
    **{(True, 4, 1): 400, (True, 8, 1): 510, (True, 8, 2): 850},
}
_REGISTERS = {
    **{(False, 4, 1): 88, (False, 8, 1): 112, (False, 8, 2): 144, (False, 8, 4): 216},
    **{(True, 4, 1): 96, (True, 8, 1): 128, (True, 8, 2): 168},
}
# Blocks of a cluster, one to a multiprocessor, that are active at once, as a share of the multiprocessors.
_ACTIVE = {1: 1.0, 2: 1.0, 4: 0.94, 8: 0.856}
# Nanoseconds for each of `warp_cost_terms`.
_COST = {
    False: (20.0, 40.0, 250.0, 0.6, 0.3, 0.037),
    True: (20.0, 40.0, 250.0, 0.6, 0.3, 0.037),
}


def warp_cost_terms(
    problem: Problem, tile: WarpTile, plan: Plan, shared_limit: int, processors: int
) -> tuple[float, ...]:
    """What the time of a launch is made of, each times its lines and waves of blocks.

    1. a line, 2. neighbouring warps, 3. neighbouring blocks, 4. the instructions of one warp, 5. those of
    the other warps that share its scheduler, 6. bytes of a multiprocessor, rows filled up to 32.
    """
    key = (problem.backward, tile.vec * problem.itemsize // 2, tile.run)
    instructions = _INSTRUCTIONS[key]
    blocks = max(
        1,
        min(
            (shared_limit + 1024) // (plan.shared_bytes + 1024),
            65536 // (_REGISTERS[key] * plan.threads),
            2048 // plan.threads,
            32,
        ),
    )
    share = _ACTIVE[tile.cluster] if blocks == 1 else 1.0
    active = max(1, int(share * processors * blocks) // tile.cluster)
    waves = ceil_div(plan.grid // tile.cluster, active)
    times = waves * problem.chunk_lines
    resident = min(blocks, ceil_div(plan.grid, processors))
    warps = resident * plan.threads / 32
    row = tile.slice * problem.itemsize
    elements = warps * tile.span * tile.slice
    tensors = 10 if problem.backward else 4
    return (
        times,
        times if tile.position_warps * tile.cluster > 1 else 0.0,
        times if tile.cluster > 1 else 0.0,
        times * instructions,
        times * instructions * max(0.0, warps / 4 - 1),
        times * elements * problem.itemsize * tensors * max(1.0, 32 / row),
    )


def warp_estimate(problem: Problem, tile: WarpTile, plan: Plan, shared_limit: int, processors: int) -> float:
    """Estimated nanoseconds of a launch."""
    terms = warp_cost_terms(problem, tile, plan, shared_limit, processors)
    return sum(c * t for c, t in zip(_COST[problem.backward], terms, strict=True))


def choose_warp_tile(
    problem: Problem, clusters: Sequence[int], shared_limit: int, processors: int
) -> WarpTile | None:
    """The tile with the lowest :func:`warp_estimate`, or None where no warp kernel fits."""
    best, best_time = None, math.inf
    for tile in warp_tiles(problem, [n for n in clusters if n in CLUSTERS]):
        plan = warp_plan(problem, tile, True, shared_limit)
        if plan is None:
            continue
        time = warp_estimate(problem, tile, plan, shared_limit, processors)
        if time < best_time:
            best, best_time = tile, time
    return best
