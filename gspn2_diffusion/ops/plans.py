"""How a scan is spread over threads and blocks, and how much shared memory that takes.

Plain arithmetic, without torch or a GPU. The kernels and the fields' meaning: ``cuda/tiled.cuh`` (tiled) and
``struct Task`` in ``cuda/common.cuh`` (generic).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHERS, ITEMS = 128, 4  # as in cuda/tiled.cuh
HELPERS = WEIGHERS + 32  # threads beside the consumers
MAX_GRID = 2**31 - 1
MAX_BOX = 256  # positions that the tensor memory accelerator copies at once
_SUMMED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # lanes of a position whose values shuffles add up, backward
_GENERIC_THREADS = 512  # __launch_bounds__ of the generic kernels
RUNS = ((4, 1), (8, 1), (8, 3))  # channels and positions of a thread, for elements of two bytes
_PREFERRED_SHARED_BYTES = 48 * 1024  # more would leave too few generic blocks on a multiprocessor


@dataclass(frozen=True)
class Problem:
    """What a plan depends on.

    Attributes:
        directions: indices into ``("down", "up", "right", "left")``.
        chunk: lines after which the hidden state restarts, 0 for never.
        itemsize: bytes of an element.
        touching: neighbouring positions of a row touch in memory, in every operand.
    """

    batch: int
    height: int
    width: int
    channels: int
    groups: int
    directions: tuple[int, ...]
    chunk: int
    itemsize: int
    backward: bool
    touching: bool = False

    @property
    def per_group(self) -> int:
        return self.channels // self.groups

    @property
    def lines(self) -> int:
        """Lines of the longest scan."""
        return self.line_counts[-1]

    @property
    def line_counts(self) -> list[int]:
        """Lines of a scan, for each kind of direction that is asked for."""
        return sorted({self.height if d < 2 else self.width for d in self.directions})

    @property
    def line_lengths(self) -> list[int]:
        """Positions on a line, for each kind of direction that is asked for."""
        return sorted({self.width if d < 2 else self.height for d in self.directions})

    @property
    def chunk_lines(self) -> int:
        return min(self.chunk or self.lines, self.lines)

    @property
    def shape(self) -> tuple[int, ...]:
        """What every kernel is told of the problem."""
        packed = sum(code << (2 * slot) for slot, code in enumerate(self.directions))
        sizes = (self.batch, self.height, self.width, self.channels, self.groups)
        return (*sizes, len(self.directions), packed)


@dataclass(frozen=True)
class Tile:
    """Choices of a tiled launch; see ``struct Tiling`` in ``cuda/tiled.cuh``.

    Attributes:
        vec, run: channels and positions of a consumer thread.
        slice: channels of a block.
        cluster: blocks that share a line.
        halo: lines between two exchanges of a cluster, 0 without one.
        stage_lines: lines that are fetched together, a power of two; divides ``halo``.
        merged: the accelerator copies rows of several positions or lines, see ``struct Tile`` there.
    """

    vec: int
    run: int
    slice: int
    cluster: int
    halo: int
    stage_lines: int
    merged: bool = False

    def most_threads(self, backward: bool) -> int:
        """KERNEL_THREADS of the tiled kernels."""
        if self.run > 1:
            return 384 if backward and self.cluster > 1 else 512
        return 736 if backward else 1024

    def registers(self, backward: bool) -> int:
        """Of a thread, at most, in steps of eight."""
        if self.run > 1:
            return 152 if backward and self.cluster > 1 else 128
        if not backward:
            return 64
        return 80 if self.vec > 4 and self.cluster > 1 else 72


@dataclass(frozen=True, eq=False)  # compared by identity: it is a key of what is kept for every launch
class Plan:
    """A launch: the source file, its entry point, vector width, sizes, and the kernel's shape parameters."""

    source: str
    entry: str
    vec: int
    run: int  # positions of a thread; 1 for the generic kernels
    grid: int
    threads: int
    shared_bytes: int
    parameters: tuple[int, ...]
    scratch_floats: int = 0  # of all blocks; generic kernels whose lines do not fit shared memory
    channel_slices: int = 1  # partial sums of the weights' gradient for each group
    tile: Tile | None = None  # of a tiled launch
    widths: tuple[int, int] = (0, 0)  # positions of a tile along a row and along a column
    blocks: int = 1  # of a cluster
    boxes: int = 1  # a line's positions are copied in so many boxes
    ring: int = 0  # stages in shared memory
    whole: bool = False  # all lines of a stage are stored at once


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


# ---- generic kernels ----------------------------------------------------------------------------


def generic_plan(problem: Problem, vec: int, shared_limit: int) -> Plan:
    """Any shape and alignment.

    Args:
        vec: elements of one vector access that all addresses allow.
        shared_limit: bytes of shared memory that a block may have.

    Raises:
        ValueError: the problem needs more blocks than a launch has.
    """
    longest_line = problem.line_lengths[-1]
    lanes = min(32, _power_of_two(ceil_div(problem.per_group, vec)))
    group_lanes = min(_power_of_two(problem.groups), 32 // lanes)

    def floats_per_position(lanes: int, group_lanes: int) -> int:
        return 2 * (lanes * group_lanes * vec + (3 * group_lanes if problem.backward else 0))

    while 4 * longest_line * floats_per_position(lanes, group_lanes) > min(
        shared_limit, _PREFERRED_SHARED_BYTES
    ):
        if group_lanes > 1:
            group_lanes //= 2
        elif lanes > 1:
            lanes //= 2
        else:
            break
    floats = floats_per_position(lanes, group_lanes)
    shared = 4 * longest_line * floats
    fits = shared <= shared_limit
    channel_slices = ceil_div(problem.per_group, vec * lanes)
    group_slices = ceil_div(problem.groups, group_lanes)
    chunks = ceil_div(problem.lines, problem.chunk_lines)
    grid = channel_slices * group_slices * chunks * len(problem.directions) * problem.batch
    check_grid(grid, problem)
    per_position = lanes * group_lanes
    name = "line_scan_backward" if problem.backward else "line_scan_forward"
    return Plan(
        source=name,
        entry=name,
        vec=vec,
        run=1,
        grid=grid,
        threads=per_position * min(longest_line, _GENERIC_THREADS // per_position),
        shared_bytes=shared if fits else 0,
        parameters=(
            *problem.shape,
            problem.chunk_lines,
            chunks,
            lanes,
            group_lanes,
            channel_slices,
            group_slices,
        ),
        scratch_floats=0 if fits else max(problem.height, problem.width) * floats * grid,
        channel_slices=channel_slices,
    )


def check_grid(grid: int, problem: Problem) -> None:
    """Raise ValueError where a launch cannot have so many blocks."""
    if grid > MAX_GRID:
        shape = (problem.batch, problem.height, problem.width, problem.channels)
        raise ValueError(f"x of shape {shape} needs {grid} blocks, more than the {MAX_GRID} of a launch")


# ---- tiled kernels ------------------------------------------------------------------------------


def tiled_plan(problem: Problem, tile: Tile, normalize: bool, shared_limit: int) -> Plan | None:
    """The launch of one tile choice, or None where it does not fit the problem or the GPU."""
    lanes = tile.slice // tile.vec
    if tile.slice % tile.vec or (problem.per_group % tile.slice and not _may_overhang(problem, tile)):
        return None
    if (problem.backward and lanes not in _SUMMED) or tile.stage_lines & (tile.stage_lines - 1):
        return None
    # The accelerator reads and writes shared memory at multiples of 128 bytes.
    unit = 128 // math.gcd(128, tile.slice * problem.itemsize)
    if tile.halo % unit or tile.halo % tile.stage_lines or (tile.merged and not may_merge(problem, tile)):
        return None
    longest = ceil_div(problem.line_lengths[-1], tile.cluster)
    boxes = ceil_div(longest + 2 * max(tile.halo, 1) + unit, MAX_BOX)
    widths = [
        ceil_div(ceil_div(length, tile.cluster), unit * boxes) * unit * boxes
        for length in problem.line_lengths
    ]
    for length, width in zip(problem.line_lengths, widths, strict=True):
        if length - (tile.cluster - 1) * width < max(tile.halo, 1):
            return None  # the last block would have less than its neighbour needs
    if tile.merged and boxes > 1:
        return None
    extended = widths[-1] + 2 * tile.halo
    consumers = 32 * ceil_div(ceil_div(extended, tile.run), 32 // lanes) if lanes <= 32 else MAX_GRID
    if consumers + HELPERS > tile.most_threads(problem.backward):
        return None
    ring, shared = _ring(problem, tile, widths, boxes, consumers, shared_limit)
    if shared > shared_limit:
        return None
    if tile.stage_lines * (extended + 2) > WEIGHERS * ITEMS:
        return None
    slices = ceil_div(problem.channels, tile.slice)
    chunks = ceil_div(problem.lines, problem.chunk_lines)
    # No stage reaches into another chunk or out of the picture, where storing is an illegal instruction.
    whole = all(n % tile.stage_lines == 0 for n in (problem.chunk_lines, *problem.line_counts))
    grid = tile.cluster * slices * chunks * len(problem.directions) * problem.batch
    check_grid(grid, problem)
    by_length = dict(zip(problem.line_lengths, widths, strict=True))
    across, down = by_length.get(problem.width, 0), by_length.get(problem.height, 0)
    name = "line_scan_backward_tiled" if problem.backward else "line_scan_forward_tiled"
    return Plan(
        source=name,
        entry=f"{name}_{tile.cluster}",
        blocks=tile.cluster,
        vec=tile.vec,
        run=tile.run,
        grid=grid,
        threads=consumers + HELPERS,
        shared_bytes=shared,
        parameters=(
            *problem.shape,
            problem.chunk_lines,
            chunks,
            tile.slice,
            slices,
            tile.halo,
            tile.stage_lines,
            ring,
            weight_pitch(tile, widths[-1]),
            across,
            down,
            boxes,
            consumers,
            int(normalize),
            int(whole),
            int(tile.merged),
        ),
        channel_slices=slices // problem.groups,
        tile=tile,
        widths=(across, down),
        boxes=boxes,
        ring=ring,
        whole=whole,
    )


def _may_overhang(problem: Problem, tile: Tile) -> bool:
    """Whether the last slice may end behind the last channel, where the accelerator reads zeros."""
    return problem.groups == 1 and tile.slice < problem.channels


def may_merge(problem: Problem, tile: Tile) -> bool:
    """Whether rows can be merged: into 128 bytes along a row, into those of a stage across it.

    Across, the lines of a stage leave together, so none of them may belong to another chunk.
    """
    row = tile.slice * problem.itemsize
    alone = tile.slice == problem.channels and problem.chunk_lines == problem.lines
    whole = 128 % row == 0 and problem.width % (128 // row) == 0
    return problem.touching and alone and tile.run == 1 and whole


def weight_pitch(tile: Tile, width: int) -> int:
    """From the weights of a line in shared memory to the next line's; ``width``: of the widest block.

    Eight threads side by side may have several lines: their weights, of 16 bytes, should fill all banks.
    """
    extended = width + 2 * tile.halo
    return ceil_div(extended, 8) * 8 + 8 // tile.stage_lines if tile.stage_lines > 1 else extended


def resident_blocks(tile: Tile, backward: bool, threads: int, shared_bytes: int, shared_limit: int) -> int:
    """Blocks of a tiled launch that a multiprocessor holds at once."""
    by_memory = (shared_limit + 1024) // (shared_bytes + 1024)  # the system takes 1 KiB of each
    return max(1, min(by_memory, 2048 // threads, 65536 // (tile.registers(backward) * threads)))


def _ring(
    problem: Problem, tile: Tile, widths: Sequence[int], boxes: int, consumers: int, shared_limit: int
) -> tuple[int, int]:
    """Stages in shared memory, and its bytes: four, or three where only these fit or let another block fit.

    (32, 74, 74, 64) forward takes 0.095 ms with stages of four lines, of which four would not fit, and 0.105
    of two; (512, 16, 16, 96) 0.122 instead of 0.151 with three blocks on a multiprocessor.
    """
    threads = consumers + HELPERS

    def needed(ring: int) -> int:
        return max(tiled_shared_bytes(problem, tile, width, boxes, consumers, ring) for width in widths)

    four, three = needed(4), needed(3)
    with_four, with_three = (
        resident_blocks(tile, problem.backward, threads, shared, shared_limit) for shared in (four, three)
    )
    return (3, three) if four > shared_limit or with_three > with_four else (4, four)


def tiled_shared_bytes(
    problem: Problem, tile: Tile, width: int, boxes: int, consumers: int, ring: int
) -> int:
    """Shared memory of a block with ``width`` positions of its own: ``struct Memory`` of the kernels."""
    extended = width + 2 * tile.halo
    counts = (*[extended] * 2, *[width] * 2, width + 2) if problem.backward else (extended, extended, width)
    line = tile.stage_lines * tile.slice * problem.itemsize
    stages = sum(boxes * ceil_div(ceil_div(count, boxes) * line, 128) * 128 for count in counts)
    weights = 16 * 2 * tile.stage_lines * weight_pitch(tile, width)
    per_warp = 32 // (tile.slice // tile.vec)
    border = consumers // 32 * per_warp + 2 if tile.run == 1 else 2 * (consumers // 32 + 2)
    states = 4 * tile.slice * (2 * border + 4 * tile.halo)
    return ring * (stages + 2 * 8) + 2 * 8 + weights + states
