"""The plane kernel, one channel with rows in one piece, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from scan_cases import FORWARD_TOLERANCE, ground_truth, make_inputs, relative_error

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.plane_plans import CLUSTERS, plane_plan, plane_tiles
from gspn2_diffusion.ops.plans import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

SHAPES = [  # (H, W), chunk, options of the inputs
    ((4, 8), 0, {}),
    ((20, 136), 0, {"normalize": False}),
    ((140, 24), 8, {"with_u": False}),
    ((260, 520), 0, {}),
    ((1024, 1024), 64, {}),
    ((1200, 40), 0, {"with_u": False}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "chunk", "kind"), SHAPES)
def test_plane(size, chunk, kind, dtype):
    inputs = make_inputs(2, *size, 1, dtype=dtype, device="cuda", **kind)
    apart = {
        n: t if n == "x" or t is None else t.detach().movedim(3, 0).contiguous().movedim(0, 3)
        for n, t in inputs.items()
    }
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    zeros = torch.zeros_like(apart["lam"])
    want = ground_truth(apart, zeros, **options)["y"]
    kept = ground_truth({**apart, "u": None}, zeros, **options)["y"]
    problem = Problem(2, *size, 1, 1, (0, 1, 2, 3), chunk, dtype.itemsize, False)
    limit = cupy_backend.shared_limit(0)
    ran = 0
    for tile in plane_tiles(problem, [n for n in cupy_backend.clusters(0) if n in CLUSTERS]):
        plan = plane_plan(problem, tile, normalize, limit)
        if plan is None:
            continue
        setting = ((0, 1, 2, 3), chunk, normalize)
        y, state = scan_kernels.line_scan_forward(*apart.values(), *setting, True, plan=plan)
        again, _ = scan_kernels.line_scan_forward(*apart.values(), *setting, True, plan=plan)
        assert relative_error(y, want) <= FORWARD_TOLERANCE[dtype], tile
        assert relative_error(y if state is None else state, kept) <= FORWARD_TOLERANCE[dtype], tile
        assert torch.equal(y, again), tile
        ran += 1
    assert ran
