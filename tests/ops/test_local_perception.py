"""The local perception operator: the reference, bad input, and the kernels on an emulated GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from emulate import emulated, needs_compiler
from local_perception_cases import NAMES, ground_truth, make_inputs, spread
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, relative_error

from gspn2_diffusion.ops import local_perception_kernels as kernels
from gspn2_diffusion.ops.local_perception import local_perception

BF16, FP32 = torch.bfloat16, torch.float32


def test_the_reference_is_a_convolution_and_its_residual():
    x, weight, bias, _ = make_inputs((2, 3, 5, 6), torch.float64)
    picture = x.movedim(-1, 1)
    expected = picture + F.conv2d(picture, weight, bias, padding=1, groups=6)
    torch.testing.assert_close(local_perception(x, weight, bias).movedim(-1, 1), expected)
    assert torch.autograd.gradcheck(local_perception, (x, weight, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 6)}, ValueError, r"x must have shape \(B, H, W, C\), got \(3, 4, 6\)"),
        (
            {"weight": torch.zeros(6, 6, 3, 3)},
            ValueError,
            r"weight must .*\(6, 1, 3, 3\), got \(6, 6, 3, 3\)",
        ),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(C,\) = \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(6).bfloat16()}, TypeError, "bias has dtype torch.bfloat16, but weight has"),
        (
            {"weight": torch.zeros(6, 1, 3, 3, device="meta")},
            ValueError,
            "weight is on meta, but x is on cpu",
        ),
        ({"backend": "cupy"}, ValueError, "backend='cupy' needs tensors on a CUDA device, got device 'cpu'"),
    ],
)
def test_bad_input(change, error, message):
    x, weight, bias, _ = make_inputs((1, 3, 4, 6), FP32)
    arguments = {"x": x, "weight": weight, "bias": bias, **change}
    with pytest.raises(error, match=message):
        local_perception(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias"), **arguments)


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "weight_dtype", "views"),
    [
        ((2, 19, 10, 8), BF16, None, False),  # two bands of rows, a tile that ends beyond the picture
        ((1, 5, 3, 132), BF16, FP32, True),  # two slices of channels
        ((3, 1, 9, 4), FP32, None, True),
        ((2, 4, 1, 3), FP32, None, False),  # one channel at a time
    ],
)
def test_kernels(monkeypatch, shape, dtype, weight_dtype, views):
    x, weight, bias, dy = make_inputs(shape, dtype, weight_dtype)
    want = ground_truth(x, weight, bias, dy)
    if views:
        x, dy = spread(x), spread(dy)
    x = x.detach().requires_grad_()
    with emulated(monkeypatch):
        y = kernels.LocalPerception.apply(x, weight, bias)
        grads = torch.autograd.grad(y, (x, weight, bias), dy)
        again = torch.autograd.grad(kernels.LocalPerception.apply(x, weight, bias), bias, dy)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[dtype]
    assert torch.equal(again[0], grads[2])
    for name, source, got in zip(NAMES, (x, weight, bias), grads, strict=True):
        assert got.dtype == source.dtype
        assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[dtype], name


def test_bands_fill_the_gpu_where_the_picture_is_small(monkeypatch):
    monkeypatch.setattr(kernels.cupy_backend, "processors", lambda device: 132)
    monkeypatch.setattr(kernels.cupy_backend, "starter", lambda *_: None)
    rows = []
    for side in (32, 512):
        launch = kernels._convolution.__wrapped__(
            (1, side, side, 1152), (0, 0, 0), kernels.Setting(BF16, 0, (), 0, False), 4, False, False
        )
        rows.append(launch.plan.parameters[4])
        assert launch.plan.grid * 256 >= side * side // rows[-1] // 4 * 288
    assert rows == [2, 16]
