"""Which kernel and which tile: what every plan must keep to, whatever the constants are."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.plane_plans import CLUSTERS as PLANE_CLUSTERS
from gspn2_diffusion.ops.plane_plans import plane_plan, plane_tiles
from gspn2_diffusion.ops.plans import (
    HELPERS,
    ITEMS,
    MAX_BOX,
    WEIGHERS,
    Problem,
    Tile,
    generic_plan,
    resident_blocks,
    tiled_plan,
)
from gspn2_diffusion.ops.tile_choice import MEASURED, choose_tile, estimate, measured_tile, tiles

LIMIT, PROCESSORS, CLUSTERS = 227 * 1024, 132, (1, 2, 3, 4, 5, 7, 8, 16)
PROBLEM = Problem(2, 96, 160, 96, 1, (0, 1, 2, 3), 0, 2, False)
PROBLEMS = [
    dataclasses.replace(
        PROBLEM, batch=b, height=h, width=w, channels=c, groups=g, itemsize=size, backward=back
    )
    for b, h, w, c, g in [
        (1, 64, 64, 32, 1),
        (3, 33, 65, 48, 2),
        (1, 512, 300, 144, 1),
        (16, 1024, 1024, 8, 1),
        (1, 2048, 1000, 64, 1),
        (2, 1, 7, 8, 1),
        (1, 128, 128, 280, 1),
    ]
    for size in (2, 4)
    for back in (False, True)
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_tile_keeps_to_the_kernels_rules(problem):
    plans = [p for p in (tiled_plan(problem, t, True, LIMIT) for t in tiles(problem)) if p is not None]
    assert plans
    for plan in plans:
        tile = plan.tile
        assert tile is not None
        lanes = tile.slice // tile.vec
        row_bytes = tile.slice * problem.itemsize
        assert tile.slice == lanes * tile.vec
        assert problem.per_group % tile.slice == 0 or (problem.groups == 1 and tile.slice < problem.channels)
        assert plan.parameters[plan.parameters.index(tile.slice, 9) + 1] * tile.slice >= problem.channels
        assert row_bytes % 16 == 0
        assert (tile.halo > 0) == (tile.cluster > 1)
        assert plan.shared_bytes <= LIMIT
        assert plan.threads % 32 == 0
        assert plan.threads <= tile.most_threads(problem.backward) <= 1024
        assert tile.halo * row_bytes % 128 == 0
        for length, width in zip((problem.width, problem.height), plan.widths, strict=True):
            extended = width + 2 * tile.halo
            assert width * row_bytes % 128 == 0
            assert length - (tile.cluster - 1) * width >= max(1, tile.halo)
            assert tile.cluster * width >= length
            assert math.ceil((extended + 2) / plan.boxes) <= MAX_BOX + 1
            assert (extended + 2) * tile.stage_lines <= WEIGHERS * ITEMS
            per_warp = 32 // lanes
            assert (plan.threads - HELPERS) // 32 * per_warp * tile.run >= extended


@pytest.mark.parametrize("problem", PROBLEMS)
def test_whatever_is_launched_is_compiled_beforehand(problem):
    """By ``gspn2 doctor --prewarm``, for GPUs with clusters and for those without."""
    dtypes = {2: (torch.bfloat16, torch.float16), 4: (torch.float32,)}[problem.itemsize]
    for clusters in (CLUSTERS, (1,)):
        compiled = set(cupy_backend.variants(clusters))
        plans = [tiled_plan(problem, tile, True, LIMIT) for tile in tiles(problem, clusters)]
        chunk = 16 // problem.itemsize
        plans += [generic_plan(problem, vec, LIMIT) for vec in (1, chunk) if problem.per_group % vec == 0]
        flat = dataclasses.replace(problem, channels=1, groups=1, width=problem.width + -problem.width % 8)
        sizes = [n for n in clusters if n in PLANE_CLUSTERS]
        plans += [plane_plan(flat, tile, True, LIMIT) for tile in plane_tiles(flat, sizes)]
        wanted = {cupy_backend.variant_of(plan, dtype) for plan in plans if plan for dtype in dtypes}
        kinds = {each.name.rpartition("_")[2] for each in wanted}
        assert ("backward" if problem.backward else "forward") in kinds
        assert "tiled" in kinds or len(clusters) == 1  # where a line may be too long for one block
        assert wanted <= compiled


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_chosen_tile_is_the_cheapest(problem):
    processors = PROCESSORS - 2  # for which there are no measured tiles
    chosen = choose_tile(problem, CLUSTERS, LIMIT, processors)
    assert chosen is not None
    times = {
        tile: estimate(problem, plan, LIMIT, processors)
        for tile in tiles(problem, CLUSTERS)
        if (plan := tiled_plan(problem, tile, True, LIMIT)) is not None
    }
    assert times[chosen] == min(times.values()) > 0


def test_measured_tiles_are_for_what_was_measured():
    measured = [
        (
            dataclasses.replace(
                PROBLEM,
                **dict(zip(("batch", "height", "width", "channels"), shape, strict=True)),
                backward=backward,
                touching=tile.merged,
            ),
            tile,
        )
        for backward, found in MEASURED.items()
        for shape, tile in found.items()
    ]
    assert len(measured) > 10
    for problem, tile in measured:
        plan = tiled_plan(problem, tile, True, LIMIT)
        assert plan is not None
        assert math.isfinite(estimate(problem, plan, LIMIT, PROCESSORS))
        assert choose_tile(problem, CLUSTERS, LIMIT, PROCESSORS) == tile
        assert measured_tile(problem, CLUSTERS, PROCESSORS + 2) is None
        assert (measured_tile(problem, (1,), PROCESSORS) is None) == (tile.cluster > 1)
        for changed in ({"groups": 2}, {"chunk": 16}, {"directions": (0, 1)}, {"itemsize": 4}, {"batch": 3}):
            assert measured_tile(dataclasses.replace(problem, **changed), CLUSTERS, PROCESSORS) is None


@pytest.mark.parametrize(
    ("size", "channels", "backward", "tile", "poor"),
    [
        # backward, slices of 48 in clusters are for large pictures
        (128, 144, True, Tile(8, 1, 48, 8, 4, 2), True),
        (256, 144, True, Tile(8, 1, 48, 8, 4, 2), False),
        (512, 144, True, Tile(8, 1, 48, 8, 4, 1), False),
        (512, 48, True, Tile(8, 1, 48, 8, 4, 1), True),  # and for more channels than that
        (256, 144, False, Tile(8, 1, 48, 8, 4, 2), False),
        (256, 144, False, Tile(8, 1, 48, 8, 8, 4), False),
        (512, 144, False, Tile(8, 1, 48, 8, 8, 2), True),
        (1024, 144, True, Tile(4, 1, 16, 16, 8, 2), True),  # stages of lines whose rows are shared
        (1024, 144, True, Tile(4, 1, 16, 16, 8, 1), False),
        (1024, 16, True, Tile(4, 1, 16, 16, 8, 2), False),
        (1024, 48, True, Tile(8, 1, 48, 16, 4, 1), False),  # but not of many lines
        (64, 1152, True, Tile(8, 1, 48, 1, 0, 1), False),  # nor of whole ones
    ],
)
def test_tiles_that_measurements_rule_out(size, channels, backward, tile, poor):
    sizes = {"batch": 1, "height": size, "width": size, "channels": channels}
    problem = dataclasses.replace(PROBLEM, **sizes, backward=backward, touching=tile.merged)
    plan = tiled_plan(problem, tile, True, LIMIT)
    assert plan is not None
    assert math.isinf(estimate(problem, plan, LIMIT, PROCESSORS)) == poor


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("size", "channels"), [(128, 48), (512, 128), (512, 144), (1024, 48)])
def test_blocks_get_many_positions_only_where_there_are_no_clusters(size, channels, backward):
    sizes = {"batch": 1, "height": size, "width": size, "channels": channels}
    problem = dataclasses.replace(PROBLEM, **sizes, backward=backward)
    for clusters, wide in ((CLUSTERS, False), ((1,), size > 128)):
        tile = choose_tile(problem, clusters, LIMIT, PROCESSORS)
        if tile is None:
            assert clusters == (1,)  # too long a line for one block
            continue
        plan = tiled_plan(problem, tile, True, LIMIT)
        assert plan is not None
        assert (max(plan.widths) > 128) == wide


def test_clusters_only_where_the_gpu_has_them():
    problem = dataclasses.replace(PROBLEM, height=256, width=256)
    with_clusters = choose_tile(problem, CLUSTERS, LIMIT, PROCESSORS)
    without = choose_tile(problem, (1,), LIMIT, PROCESSORS)
    assert with_clusters is not None
    assert without is not None
    assert with_clusters.cluster > 1 == without.cluster


def test_the_last_slice_overhangs_where_only_short_ones_divide_the_channels():
    def slices(channels: int, clusters: tuple[int, ...] = CLUSTERS, groups: int = 1) -> set[int]:
        problem = dataclasses.replace(PROBLEM, channels=channels, groups=groups)
        found = [(t.slice, tiled_plan(problem, t, True, LIMIT)) for t in tiles(problem, clusters)]
        return {size for size, plan in found if plan is not None}

    assert slices(280) == {8, 16, 32, 48, 64}
    assert slices(280, clusters=(1,)) == {8}  # without the accelerator
    assert slices(280, groups=5) == {8}  # a slice belongs to one group
    assert slices(24) == {8, 16}  # never longer than all channels
    assert slices(96) == {8, 16, 32, 48}
    chosen = choose_tile(dataclasses.replace(PROBLEM, channels=280), CLUSTERS, LIMIT, PROCESSORS)
    assert chosen is not None
    assert chosen.slice >= 32


def test_rows_of_few_channels_are_merged_where_they_touch():
    problem = dataclasses.replace(PROBLEM, batch=16, height=1024, width=1024, channels=8)
    for backward in (False, True):
        for touching in (False, True):
            either = dataclasses.replace(problem, backward=backward, touching=touching)
            chosen = choose_tile(either, CLUSTERS, LIMIT, PROCESSORS)
            assert chosen is not None
            assert chosen.merged == touching
    merged = dataclasses.replace(chosen, merged=True)
    assert tiled_plan(either, merged, True, LIMIT) is not None
    changes = {"touching": False, "chunk": 128, "width": 1020, "channels": 16}
    for name, value in changes.items():
        other = dataclasses.replace(either, **{name: value})
        assert tiled_plan(other, merged, True, LIMIT) is None, name
        assert tiled_plan(other, dataclasses.replace(merged, merged=False), True, LIMIT) is not None, name
    assert tiled_plan(either, dataclasses.replace(merged, run=3), True, LIMIT) is None


def test_nothing_tiled_fits_a_line_that_is_too_long():
    problem = dataclasses.replace(PROBLEM, height=3, width=40_000, channels=8)
    assert choose_tile(problem, (1,), LIMIT, PROCESSORS) is None
    plan = generic_plan(problem, 8, LIMIT)
    assert plan.source == "line_scan_forward"
    assert plan.scratch_floats > 0


def test_a_tile_that_does_not_fit_is_none():
    good = Tile(8, 1, 32, 2, 8, 2)
    assert tiled_plan(PROBLEM, good, True, LIMIT) is not None
    for changed in ({"slice": 64}, {"halo": 3}, {"stage_lines": 3}, {"cluster": 16}):
        assert tiled_plan(PROBLEM, dataclasses.replace(good, **changed), True, LIMIT) is None, changed
    assert tiled_plan(PROBLEM, good, True, 16 * 1024) is None


def test_three_stages_in_shared_memory_where_only_these_or_another_block_fit_then():
    small = dataclasses.replace(PROBLEM, batch=512, height=16, width=16, channels=96)
    large = dataclasses.replace(PROBLEM, batch=32, height=74, width=74, channels=64)
    for problem, tile, limit, ring, blocks in (
        (small, Tile(8, 1, 48, 1, 0, 4), LIMIT, 3, 3),
        (small, Tile(8, 1, 48, 1, 0, 2), LIMIT, 4, 3),
        (small, Tile(8, 1, 48, 1, 0, 4), 100_000, 4, 1),
        (large, Tile(8, 1, 32, 1, 0, 1), LIMIT, 4, 2),
        (large, Tile(8, 1, 32, 1, 0, 2), LIMIT, 3, 2),
        (large, Tile(8, 1, 32, 1, 0, 4), LIMIT, 3, 1),
    ):
        plan = tiled_plan(problem, tile, True, limit)
        assert plan is not None
        assert plan.ring == ring, tile
        assert plan.shared_bytes <= limit
        assert resident_blocks(tile, False, plan.threads, plan.shared_bytes, limit) == blocks


def test_too_many_blocks():
    with pytest.raises(ValueError, match=r"x of shape \(600000000, 4, 4, 16\) needs .* blocks"):
        generic_plan(
            dataclasses.replace(PROBLEM, batch=600_000_000, height=4, width=4, channels=16), 1, LIMIT
        )
