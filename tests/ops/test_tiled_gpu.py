"""Every kind of tiled launch against the float64 reference, whatever the plan would choose by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scan_cases import (
    BACKWARD_TOLERANCE,
    FORWARD_TOLERANCE,
    directions_outermost,
    ground_truth,
    make_inputs,
    plan_with_ring,
    relative_error,
)

from gspn2_diffusion.ops import cupy_backend, launches, scan_kernels
from gspn2_diffusion.ops.line_scan import DIRECTIONS
from gspn2_diffusion.ops.plans import Problem, Tile, tiled_plan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

CASES = [  # (H, W), C, G, tile of elements of two bytes, chunk
    ((64, 64), 32, 1, Tile(4, 1, 8, 1, 0, 4), 0),
    ((33, 65), 48, 1, Tile(8, 1, 16, 1, 0, 2), 0),
    ((33, 65), 48, 1, Tile(8, 3, 16, 1, 0, 1), 0),
    ((74, 50), 64, 2, Tile(8, 3, 32, 1, 0, 2), 0),
    ((40, 70), 64, 1, Tile(4, 1, 32, 1, 0, 2), 7),
    ((40, 70), 32, 1, Tile(8, 3, 32, 1, 0, 4), 16),
    ((61, 90), 32, 1, Tile(4, 1, 16, 2, 8, 4), 0),
    ((61, 90), 32, 1, Tile(8, 3, 32, 2, 4, 2), 0),
    ((130, 97), 16, 1, Tile(8, 1, 16, 4, 4, 1), 0),
    ((130, 120), 16, 1, Tile(4, 1, 8, 4, 8, 4), 0),
    ((130, 97), 16, 1, Tile(8, 3, 16, 4, 8, 4), 29),
    ((150, 190), 64, 2, Tile(8, 1, 32, 8, 8, 4), 0),
    ((150, 190), 64, 1, Tile(8, 3, 64, 8, 8, 2), 0),
    ((310, 318), 16, 1, Tile(8, 1, 16, 16, 8, 2), 0),
    # six and twelve lanes to a position
    ((150, 190), 96, 2, Tile(8, 1, 48, 8, 8, 1), 0),
    ((40, 33), 48, 1, Tile(4, 1, 48, 2, 4, 2), 0),
    ((61, 90), 48, 1, Tile(8, 3, 48, 2, 4, 1), 17),
    # the last slice overhangs
    ((64, 64), 280, 1, Tile(8, 1, 32, 1, 0, 2), 0),
    ((61, 90), 72, 1, Tile(4, 1, 32, 2, 4, 2), 0),
    ((150, 190), 24, 1, Tile(8, 3, 16, 4, 8, 2), 31),
    ((300, 17), 24, 1, Tile(8, 3, 16, 1, 0, 1), 0),
    ((300, 17), 8, 1, Tile(8, 1, 8, 1, 0, 1), 0),
    ((1, 7), 8, 1, Tile(4, 1, 8, 1, 0, 2), 0),
]
MERGED = [  # (H, W), C, tile of elements of two bytes
    ((40, 64), 8, Tile(8, 1, 8, 1, 0, 2, merged=True)),
    ((61, 80), 16, Tile(4, 1, 16, 2, 8, 4, merged=True)),
    ((150, 120), 8, Tile(8, 1, 8, 5, 8, 2, merged=True)),
    ((310, 320), 8, Tile(4, 1, 8, 8, 8, 4, merged=True)),
]


def run_tile(inputs, dy, tile, chunk=0, normalize=True, ring=None):
    """``y`` and the gradients of a launch with this tile; the gradients' launch may need a smaller one.

    ``ring``: stages in shared memory; None for as many as are chosen.
    """
    x, groups = inputs["x"], inputs["weight"].shape[4]
    tensors = [None if t is None else t.detach() for t in inputs.values()]
    limit = cupy_backend.shared_limit(x.device.index)
    plans = []
    for backward in (False, True):
        problem = Problem(*x.shape, groups, (0, 1, 2, 3), chunk, x.element_size(), backward, tile.merged)
        smaller = [tile, *(replace(tile, stage_lines=n) for n in (4, 2, 1) if n < tile.stage_lines)]
        found = [p for p in (tiled_plan(problem, t, normalize, limit) for t in smaller) if p is not None]
        assert found, f"{tile} does not fit {tuple(x.shape)}"
        smallest = found[0].tile if ring else None
        plans.append(plan_with_ring(problem, smallest, normalize, limit, ring) if smallest else found[0])
    options = ([0, 1, 2, 3], chunk, normalize)
    y, state = scan_kernels.line_scan_forward(*tensors, *options, True, plan=plans[0])
    kept = y if inputs["u"] is None else state
    grads = scan_kernels.line_scan_backward(dy, *tensors, kept, *options, plan=plans[1])
    names = [name for name, t in inputs.items() if t is not None]
    return {"y": y, **{f"d{name}": g for name, g in zip(names, grads, strict=False)}}


def for_dtype(tile, dtype):
    """The same bytes a thread and a block, in elements of another size."""
    if dtype.itemsize == 2:
        return tile
    slices = tile.slice if tile.merged else max(tile.slice // 2, 4)  # merged are rows of all channels
    return replace(tile, vec=tile.vec // 2, slice=slices)


def assert_tile_matches(size, channels, groups, tile, chunk, dtype, ring=None, **kind):
    inputs = make_inputs(2, *size, channels, groups, dtype=dtype, device="cuda", **kind)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(2, *size, 4, channels, generator=generator, dtype=torch.float64).to("cuda", dtype)
    normalize = kind.get("normalize", True)
    if tile.merged:
        for name in ("weight", "lam", "u"):
            if inputs[name] is not None:
                inputs[name] = directions_outermost(inputs[name].detach()).requires_grad_()
        dy = directions_outermost(dy)
    got = run_tile(inputs, dy, for_dtype(tile, dtype), chunk, normalize, ring)
    want = ground_truth(inputs, dy, directions=DIRECTIONS, chunk_size=chunk or None, normalize=normalize)
    for name, value in got.items():
        tolerance = (FORWARD_TOLERANCE if name == "y" else BACKWARD_TOLERANCE)[dtype]
        if want[name].norm() < 1e-12:
            assert torch.count_nonzero(value) == 0, name
        else:
            error = relative_error(value, want[name])
            assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk"), CASES)
def test_tiles(size, channels, groups, tile, chunk, dtype):
    if tile.cluster not in cupy_backend.clusters(0):
        pytest.skip("this GPU has no clusters")
    assert_tile_matches(size, channels, groups, tile, chunk, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "groups"), [((130, 161), 32, 2), ((37, 50), 144, 1)])
def test_weight_gradients_summed_by_parts(size, channels, groups, dtype, monkeypatch):
    """As those of large pictures are, of one direction at a time or of all."""
    tile = Tile(8, 1, 16, 1, 0, 1)
    for processors in (1, cupy_backend.processors(0)):
        launches.finish_launch.cache_clear()
        monkeypatch.setattr(launches, "FINISH_BY_LINES", 0)
        monkeypatch.setattr(cupy_backend, "processors", lambda device, n=processors: n)
        assert_tile_matches(size, channels, groups, tile, 0, dtype)
    launches.finish_launch.cache_clear()


@pytest.mark.parametrize("kind", [{}, {"with_u": False}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "tile"), MERGED)
def test_merged_rows(size, channels, tile, dtype, kind):
    if tile.cluster not in cupy_backend.clusters(0):
        pytest.skip("this GPU has no clusters")
    assert_tile_matches(size, channels, 1, tile, 0, dtype, **kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk"), [*CASES[:12:2], *CASES[13:15]])
def test_three_stages_in_shared_memory(size, channels, groups, tile, chunk, dtype):
    """As where another block fits a multiprocessor then."""
    if tile.cluster not in cupy_backend.clusters(0):
        pytest.skip("this GPU has no clusters")
    assert_tile_matches(size, channels, groups, tile, chunk, dtype, ring=3)


@pytest.mark.parametrize("kind", [{"with_u": False}, {"normalize": False}])
@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk"), CASES[1:12:4])
def test_options(size, channels, groups, tile, chunk, kind):
    if tile.cluster not in cupy_backend.clusters(0):
        pytest.skip("this GPU has no clusters")
    assert_tile_matches(size, channels, groups, tile, chunk, torch.bfloat16, **kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [{}, {"with_u": False}])
@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk"), [*CASES[:6], *CASES[-2:]])
@pytest.mark.parametrize("ring", [None, 3])
def test_without_the_accelerator(size, channels, groups, tile, chunk, kind, dtype, ring, monkeypatch):
    """The copies that older GPUs make."""
    source = cupy_backend.kernel_source
    monkeypatch.setattr(cupy_backend, "kernel_source", lambda *v: "#define ACCELERATOR 0\n" + source(*v))
    caches = (cupy_backend._module, cupy_backend._kernel)
    for cache in caches:
        cache.cache_clear()
    assert_tile_matches(size, channels, groups, tile, chunk, dtype, **kind)
    for cache in caches:
        cache.cache_clear()


def test_large_values_and_negative_coefficients():
    """Weights of very different sizes, also where every sigmoid is nearly zero."""
    inputs = make_inputs(1, 40, 48, 16, device="cuda")
    with torch.no_grad():
        inputs["weight"].mul_(60).sub_(200)
    dy = torch.randn(1, 40, 48, 4, 16, device="cuda")
    got = run_tile(inputs, dy, Tile(4, 1, 8, 1, 0, 2))
    want = ground_truth(inputs, dy, directions=DIRECTIONS, chunk_size=None, normalize=True)
    for name in ("y", "dx", "dlam", "du"):
        assert relative_error(got[name], want[name]) <= 1e-4, name


def test_same_bits_every_time():
    inputs = make_inputs(2, 130, 97, 32, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(2, 130, 97, 4, 32, device="cuda", dtype=torch.bfloat16)
    tile = Tile(8, 1, 16, 4, 4, 2)
    first = run_tile(inputs, dy, tile)
    for _ in range(50):
        for name, value in run_tile(inputs, dy, tile).items():
            assert torch.equal(value, first[name]), name
