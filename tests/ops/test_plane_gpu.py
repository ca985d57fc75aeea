"""The plane kernels, one channel with rows in one piece, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, ground_truth, make_inputs, relative_error, run
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.plane_plans import CLUSTERS, PlaneTile, plane_plan, plane_tiles
from gspn2_diffusion.ops.plans import Plan, Problem

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
    apart = make_apart(size, dtype, kind)
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    zeros = torch.zeros_like(apart["lam"])
    want = ground_truth(apart, zeros, **options)["y"]
    kept = ground_truth({**apart, "u": None}, zeros, **options)["y"]
    setting = ((0, 1, 2, 3), chunk, normalize)
    for tile, plan in all_plans(size, chunk, dtype, normalize, backward=False):
        y, state = scan_kernels.line_scan_forward(*apart.values(), *setting, True, plan=plan)
        again, _ = scan_kernels.line_scan_forward(*apart.values(), *setting, True, plan=plan)
        assert relative_error(y, want) <= FORWARD_TOLERANCE[dtype], tile
        assert relative_error(y if state is None else state, kept) <= FORWARD_TOLERANCE[dtype], tile
        assert torch.equal(y, again), tile


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "chunk", "kind"), SHAPES)
def test_gradients(size, chunk, kind, dtype):
    apart = make_apart(size, dtype, kind)
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    g = torch.Generator("cuda").manual_seed(1)
    dy = rows_in_one_piece(torch.randn(apart["lam"].shape, generator=g, device="cuda").to(dtype))
    want = ground_truth(apart, dy, **options)
    setting = ((0, 1, 2, 3), chunk, normalize)
    y, state = scan_kernels.line_scan_forward(*apart.values(), *setting, True)
    kept = y if state is None else state
    for tile, plan in all_plans(size, chunk, dtype, normalize, backward=True):
        grads, again = (
            scan_kernels.line_scan_backward(dy, *apart.values(), kept, *setting, plan=plan) for _ in range(2)
        )
        for name, got, repeated in zip(apart, grads, again, strict=True):
            if apart[name] is None:
                assert got is None
                continue
            assert relative_error(got, want[f"d{name}"]) <= BACKWARD_TOLERANCE[dtype], (tile, name)
            assert torch.equal(got, repeated), (tile, name)


@pytest.mark.parametrize("with_u", [True, False])
def test_training(with_u):
    """Chosen by itself in both passes, also where the gradient of y comes in another layout."""
    apart = make_apart((40, 264), torch.bfloat16, {"with_u": with_u})
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in apart.items()}
    for layout in (rows_in_one_piece, torch.Tensor.contiguous):
        dy = layout(torch.randn_like(apart["lam"]))
        got, want = run(leaves, dy, backend="cupy"), ground_truth(apart, dy)
        for name, value in got.items():
            tolerance = (FORWARD_TOLERANCE if name == "y" else BACKWARD_TOLERANCE)[torch.bfloat16]
            assert relative_error(value, want[name]) <= tolerance, name


def rows_in_one_piece(t: Tensor) -> Tensor:
    """The same values with the directions outermost."""
    return t.detach().movedim(3, 0).contiguous().movedim(0, 3)


def make_apart(size, dtype, kind) -> dict[str, Tensor | None]:
    inputs = make_inputs(2, *size, 1, dtype=dtype, device="cuda", **kind)
    return {
        n: None if t is None else t.detach() if n == "x" else rows_in_one_piece(t) for n, t in inputs.items()
    }


def all_plans(size, chunk, dtype, normalize, backward) -> list[tuple[PlaneTile, Plan]]:
    problem = Problem(2, *size, 1, 1, (0, 1, 2, 3), chunk, dtype.itemsize, backward)
    tiles = plane_tiles(problem, [n for n in cupy_backend.clusters(0) if n in CLUSTERS])
    plans = [(tile, plane_plan(problem, tile, normalize, cupy_backend.shared_limit(0))) for tile in tiles]
    assert any(plan is not None for _, plan in plans)
    return [(tile, plan) for tile, plan in plans if plan is not None]
