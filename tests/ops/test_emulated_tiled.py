"""The tiled kernels on the processor, with an emulated tensor memory accelerator; see test_emulated.py."""

from __future__ import annotations

import pytest
import torch
from emulate import SHARED_LIMIT, emulated, needs_compiler
from scan_cases import (
    BACKWARD_TOLERANCE,
    FORWARD_TOLERANCE,
    directions_outermost,
    ground_truth,
    make_inputs,
    plan_with_ring,
    relative_error,
)

from gspn2_diffusion.ops import launches, scan_kernels
from gspn2_diffusion.ops.line_scan import DIRECTIONS
from gspn2_diffusion.ops.plans import Problem, Tile

pytestmark = needs_compiler

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [  # (H, W), C, G, tile, chunk, dtype, options of the inputs
    # ("ring": stages in shared memory, "scans": directions, "by_parts": dW is summed as in large pictures)
    ((14, 9), 32, 2, Tile(4, 1, 16, 1, 0, 4), 5, BF16, {"with_u": False}),
    ((18, 16), 16, 1, Tile(8, 3, 16, 2, 4, 1), 9, BF16, {"normalize": False}),
    ((12, 14), 8, 1, Tile(2, 1, 8, 2, 4, 4), 0, FP32, {}),
    ((16, 18), 24, 1, Tile(8, 1, 16, 2, 4, 4), 0, BF16, {}),  # the last slice overhangs
    ((16, 18), 48, 1, Tile(8, 1, 48, 2, 4, 2), 0, BF16, {}),  # six lanes to a position
    ((10, 14), 24, 1, Tile(8, 3, 24, 1, 0, 2), 4, BF16, {"with_u": False}),  # and three
    ((40, 66), 8, 1, Tile(8, 1, 8, 1, 0, 2), 0, BF16, {"by_parts": True}),  # of all directions
    ((21, 34), 32, 2, Tile(8, 1, 16, 1, 0, 2), 0, BF16, {"by_parts": True, "scans": (3, 0, 1)}),
    ((18, 35), 16, 1, Tile(4, 1, 8, 1, 0, 2), 0, FP32, {"by_parts": True}),  # of one
    ((5, 40), 144, 1, Tile(4, 1, 8, 1, 0, 1), 0, BF16, {}),  # warps share its 18 slices
    ((3, 270), 8, 1, Tile(4, 3, 8, 1, 0, 1), 0, FP32, {"scans": (1, 0)}),  # a line in two boxes
    ((27, 24), 8, 1, Tile(8, 1, 8, 2, 8, 2, merged=True), 0, BF16, {}),
    ((33, 40), 8, 1, Tile(4, 1, 8, 2, 4, 4, merged=True), 0, FP32, {"with_u": False}),
    ((27, 32), 8, 1, Tile(8, 1, 8, 2, 8, 2, merged=True), 0, BF16, {"ring": 3}),
    ((24, 16), 32, 2, Tile(4, 1, 16, 2, 8, 1), 9, BF16, {"ring": 3}),
    ((14, 9), 16, 1, Tile(8, 3, 16, 1, 0, 2), 0, BF16, {"ring": 3}),
]


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    with emulated(monkeypatch):
        yield


@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk", "dtype", "kind"), CASES)
def test_tiles(size, channels, groups, tile, chunk, dtype, kind, monkeypatch):
    """Output, hidden states and every gradient."""
    kind = dict(kind)
    if kind.pop("by_parts", False):
        monkeypatch.setattr(launches, "FINISH_BY_LINES", 0)
    scans, ring = kind.pop("scans", (0, 1, 2, 3)), kind.pop("ring", None)
    inputs = make_inputs(1, *size, channels, groups, len(scans), dtype=dtype, **kind)
    normalize = kind.get("normalize", True)
    plans = []
    for backward in (False, True):
        problem = Problem(1, *size, channels, groups, scans, chunk, dtype.itemsize, backward, tile.merged)
        plans.append(plan_with_ring(problem, tile, normalize, SHARED_LIMIT, ring))
    x, weight, lam, u = (None if t is None else t.detach() for t in inputs.values())
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if tile.merged:
        weight, lam, dy = (directions_outermost(t) for t in (weight, lam, dy))
        u = None if u is None else directions_outermost(u)
    setting = (scans, chunk, normalize)
    y, state = scan_kernels.line_scan_forward(x, weight, lam, u, *setting, True, plan=plans[0])
    kept = y if state is None else state
    names = tuple(DIRECTIONS[code] for code in scans)
    options = {"chunk_size": chunk or None, "normalize": normalize, "directions": names}
    hidden = ground_truth({**inputs, "u": None}, dy, **options)["y"]
    assert relative_error(kept, hidden) <= FORWARD_TOLERANCE[dtype]
    grads = scan_kernels.line_scan_backward(dy, x, weight, lam, u, kept, *setting, plan=plans[1])
    want = ground_truth(inputs, dy, **options)
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[dtype]
    for name, got in zip(("dx", "dweight", "dlam", "du"), grads, strict=True):
        if got is not None:
            assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[dtype], name
