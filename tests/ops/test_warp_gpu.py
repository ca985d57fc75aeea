"""Launches of the warp kernels with all kinds of tiles against the float64 reference."""

from __future__ import annotations

import random

import pytest
import torch
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, ground_truth, make_inputs, relative_error

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.line_scan import DIRECTIONS
from gspn2_diffusion.ops.plans import Problem
from gspn2_diffusion.ops.warp_plans import WarpTile, warp_plan, warp_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

SHAPES = [  # (H, W), C, G, chunk, options of the inputs
    ((64, 64), 32, 1, 0, {}),
    ((33, 65), 48, 2, 0, {}),
    ((40, 70), 64, 1, 7, {"with_u": False}),
    ((130, 97), 16, 1, 29, {}),
    ((150, 190), 144, 1, 0, {"normalize": False}),
    ((310, 318), 64, 2, 0, {}),
    ((1023, 17), 16, 1, 0, {}),
    ((1100, 40), 32, 1, 64, {"with_u": False}),
    ((1, 7), 8, 1, 0, {}),
    ((1, 1), 8, 1, 0, {"with_u": False}),
]


def run_tiles(inputs, dy, forward: WarpTile, backward: WarpTile, chunk=0, normalize=True):
    """``y`` and the gradients of a launch with these tiles."""
    x, groups = inputs["x"], inputs["weight"].shape[4]
    tensors = [None if t is None else t.detach() for t in inputs.values()]
    limit = cupy_backend.shared_limit(x.device.index)
    problems = [Problem(*x.shape, groups, (0, 1, 2, 3), chunk, x.element_size(), b) for b in (False, True)]
    plans = [
        warp_plan(p, tile, normalize, limit) for p, tile in zip(problems, (forward, backward), strict=True)
    ]
    assert None not in plans
    options = ([0, 1, 2, 3], chunk, normalize)
    y, state = scan_kernels.line_scan_forward(*tensors, *options, True, plan=plans[0])
    kept = y if inputs["u"] is None else state
    grads = scan_kernels.line_scan_backward(dy, *tensors, kept, *options, plan=plans[1])
    names = [name for name, t in inputs.items() if t is not None]
    return {"y": y, **{f"d{name}": g for name, g in zip(names, grads, strict=False)}}


def fitting_tiles(problem: Problem, count: int) -> list[WarpTile]:
    """Some of the tiles that fit, with every cluster size, run and number of lanes that can be."""
    limit = cupy_backend.shared_limit(0)
    clusters = [n for n in cupy_backend.clusters(0) if n <= 8]
    fits = [t for t in warp_tiles(problem, clusters) if warp_plan(problem, t, True, limit) is not None]
    random.Random(0).shuffle(fits)
    chosen: list[WarpTile] = []
    seen: set[tuple[str, int]] = set()
    for tile in fits:
        features = {("run", tile.run), ("lanes", tile.lanes), ("cluster", tile.cluster), ("vec", tile.vec)}
        features.add(("columns", min(tile.channel_warps, 2)))
        if not features <= seen:
            chosen.append(tile)
            seen |= features
    return (chosen + fits)[:count]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "channels", "groups", "chunk", "kind"), SHAPES)
def test_tiles(size, channels, groups, chunk, kind, dtype):
    inputs = make_inputs(2, *size, channels, groups, dtype=dtype, device="cuda", **kind)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(2, *size, 4, channels, generator=generator, dtype=torch.float64).to("cuda", dtype)
    normalize = kind.get("normalize", True)
    want = ground_truth(inputs, dy, directions=DIRECTIONS, chunk_size=chunk or None, normalize=normalize)
    shape = (2, *size, channels, groups, (0, 1, 2, 3), chunk, dtype.itemsize)
    pairs = zip(
        fitting_tiles(Problem(*shape, False), 10), fitting_tiles(Problem(*shape, True), 10), strict=False
    )
    for forward, backward in pairs:
        for name, value in run_tiles(inputs, dy, forward, backward, chunk, normalize).items():
            tolerance = (FORWARD_TOLERANCE if name == "y" else BACKWARD_TOLERANCE)[dtype]
            if want[name].norm() < 1e-12:
                assert torch.count_nonzero(value) == 0, name
            else:
                error = relative_error(value, want[name])
                tile = forward if name == "y" else backward
                assert error <= tolerance, f"{tile}: {name}: relative error {error:.2e} > {tolerance:.0e}"


def test_large_values_and_negative_coefficients():
    """Weights of very different sizes, also where every sigmoid is nearly zero."""
    inputs = make_inputs(1, 40, 48, 16, device="cuda")
    with torch.no_grad():
        inputs["weight"].mul_(60).sub_(200)
    dy = torch.randn(1, 40, 48, 4, 16, device="cuda")
    tile = WarpTile(4, 1, 2, 2, 3, 1)
    got = run_tiles(inputs, dy, tile, tile)
    want = ground_truth(inputs, dy, directions=DIRECTIONS, chunk_size=None, normalize=True)
    for name in ("y", "dx", "dlam", "du"):
        assert relative_error(got[name], want[name]) <= 1e-4, name


@pytest.mark.parametrize("cluster", [1, 4])
def test_same_bits_every_time(cluster):
    if cluster not in cupy_backend.clusters(0):
        pytest.skip("this GPU has no clusters")
    inputs = make_inputs(2, 130, 97, 32, dtype=torch.bfloat16, device="cuda")
    dy = torch.randn(2, 130, 97, 4, 32, device="cuda", dtype=torch.bfloat16)
    tile = WarpTile(8, 2, 2, 1, -(-5 // cluster), cluster)
    first = run_tiles(inputs, dy, tile, tile)
    for _ in range(50):
        for name, value in run_tiles(inputs, dy, tile, tile).items():
            assert torch.equal(value, first[name]), name
