"""The logic of the warp kernels on the processor, every thread of a cluster emulated, without a GPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from emulate import launch
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, ground_truth, make_inputs, relative_error
from torch import Tensor

from gspn2_diffusion.ops.line_scan import line_scan
from gspn2_diffusion.ops.plans import Problem
from gspn2_diffusion.ops.warp_plans import WarpTile, warp_plan

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

LIMIT = 227 * 1024
CASES = [  # (H, W), C, G, tile, chunk, dtype, options of the inputs
    ((33, 65), 16, 1, WarpTile(8, 1, 2, 1, 5, 1), 0, torch.bfloat16, {}),
    ((7, 9), 48, 2, WarpTile(8, 1, 1, 3, 1, 1), 0, torch.bfloat16, {"normalize": False}),
    ((20, 70), 32, 2, WarpTile(8, 2, 2, 2, 3, 1), 7, torch.bfloat16, {}),
    ((6, 131), 32, 1, WarpTile(8, 1, 2, 2, 2, 8), 4, torch.bfloat16, {"with_u": False}),
    ((40, 23), 48, 1, WarpTile(8, 2, 6, 1, 2, 2), 0, torch.bfloat16, {}),
    ((9, 140), 8, 1, WarpTile(4, 2, 2, 1, 3, 2), 0, torch.float32, {}),
    ((1, 7), 8, 1, WarpTile(4, 2, 2, 1, 3, 2), 0, torch.float32, {"with_u": False, "normalize": False}),
]


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def strided(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values as views of wider tensors, so that no two strides follow from each other."""

    def wide(t: Tensor) -> Tensor:
        big = poisoned((*t.shape[:-1], t.shape[-1] + 16), t.dtype)
        big[..., : t.shape[-1]] = t.detach()
        return big[..., : t.shape[-1]]

    return {name: None if t is None else wide(t) for name, t in inputs.items()}


def weights_through_normalization(dw: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """Gradient of the raw coefficients from that of the weights, ``(B, H, W, D, G, 3)``."""
    raw = weight.detach().double().requires_grad_()
    there = torch.ones(*raw.shape[1:4], 1, 3, dtype=torch.float64)
    there[:, 0, :2, :, 0] = there[:, -1, :2, :, 2] = 0
    there[0, :, 2:, :, 0] = there[-1, :, 2:, :, 2] = 0
    used = raw * there
    if normalize:
        used = torch.sigmoid(raw) * there
        used = used / used.sum(-1, keepdim=True)
    return torch.autograd.grad(used, raw, dw)[0]


def sum_over_slices(partial: Tensor, x: Tensor, groups: int) -> Tensor:
    """``(slices, D, B, lines * 3 * positions)`` as ``(B, H, W, D, G, 3)``."""
    _, height, width, _ = x.shape
    parts = partial.double().unflatten(0, (groups, -1)).sum(1)
    vertical = parts[:, :2].unflatten(-1, (height, 3, width)).permute(2, 3, 5, 1, 0, 4)
    horizontal = parts[:, 2:].unflatten(-1, (width, 3, height)).permute(2, 5, 3, 1, 0, 4)
    return torch.cat((vertical, horizontal), dim=3)


@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk", "dtype", "kind"), CASES)
def test_forward(size, channels, groups, tile, chunk, dtype, kind):
    inputs = strided(make_inputs(2, *size, channels, groups, dtype=dtype, **kind))
    x, weight, lam, u = inputs.values()
    normalize = kind.get("normalize", True)
    problem = Problem(*x.shape, groups, (0, 1, 2, 3), chunk, dtype.itemsize, False)
    plan = warp_plan(problem, tile, normalize, LIMIT)
    y, state = (poisoned(lam.shape, dtype) for _ in range(2))
    gate_strides = (0, 0, 0, 0) if u is None else u.stride()[:4]
    strides = (*x.stride()[:3], *weight.stride()[:5], *lam.stride()[:4], *gate_strides, *y.stride()[:4])
    launch(plan, dtype, [pointer(t) for t in (x, weight, lam, u, y, state)], strides, seed=len(kind))
    options = {"chunk_size": chunk or None, "normalize": normalize}
    for got, gate in ((y, u), (state, None)):
        want = ground_truth({**inputs, "u": gate}, torch.zeros_like(y), **options)["y"]
        assert relative_error(got, want) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(("size", "channels", "groups", "tile", "chunk", "dtype", "kind"), CASES)
def test_backward(size, channels, groups, tile, chunk, dtype, kind):
    inputs = strided(make_inputs(2, *size, channels, groups, dtype=dtype, **kind))
    x, weight, lam, u = inputs.values()
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    problem = Problem(*x.shape, groups, (0, 1, 2, 3), chunk, dtype.itemsize, True)
    plan = warp_plan(problem, tile, normalize, LIMIT)
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = (t.double() for t in (x, weight, lam))
    state = line_scan(*exact, None, backend="reference", **options).to(dtype)
    dx, dlam, du = poisoned((4, *x.shape), dtype), poisoned(lam.shape, dtype), poisoned(lam.shape, dtype)
    slices = groups * plan.channel_slices
    dweight = poisoned((slices, 4, 2, size[0] * size[1] * 3), torch.float32)
    gate_strides = (0, 0, 0, 0) if u is None else u.stride()[:4]
    strides = (
        *(*dy.stride()[:4], *x.stride()[:3], *weight.stride()[:5]),
        *(*lam.stride()[:4], *gate_strides, *state.stride()[:4]),
    )
    outputs = (dx, dweight, dlam, None if u is None else du)
    launch(
        plan, dtype, [pointer(t) for t in (dy, x, weight, lam, u, state, *outputs)], strides, seed=len(kind)
    )
    want = ground_truth(inputs, dy, **options)
    summed = sum_over_slices(dweight, x, groups)
    got = {"dx": dx.double().sum(0), "dlam": dlam, "du": du} if u is not None else {"dx": dx.double().sum(0)}
    got["dweight"] = weights_through_normalization(summed, weight, normalize)
    for name, value in got.items():
        if want[name].norm() < 1e-12:  # the weights of a single line or of a single position
            assert value.norm() < 1e-6, name
        else:
            assert relative_error(value, want[name]) <= BACKWARD_TOLERANCE[dtype], name


def test_a_tile_that_does_not_reach_the_last_position_is_no_plan():
    problem = Problem(1, 8, 65, 16, 1, (0,), 0, 2, False)
    assert warp_plan(problem, WarpTile(8, 1, 2, 1, 4, 1), True, LIMIT) is None
    assert warp_plan(problem, WarpTile(8, 1, 2, 1, 5, 1), True, LIMIT) is not None
