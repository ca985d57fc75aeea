"""The modulated layer norm: the reference, bad input, and the kernels on an emulated GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from ada_layer_norm_cases import NAMES, ground_truth, make_inputs
from emulate import emulated, needs_compiler
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, relative_error

from gspn2_diffusion.ops import ada_layer_norm_kernels as kernels
from gspn2_diffusion.ops.ada_layer_norm import ada_layer_norm, ada_layer_norm_reference

BF16, FP32 = torch.bfloat16, torch.float32


def test_the_reference_is_a_norm_and_its_modulation():
    x, shift, scale, _ = make_inputs((2, 5, 6), torch.float64)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ada_layer_norm(x, shift, scale), normed * (1 + scale) + shift)
    assert torch.autograd.gradcheck(ada_layer_norm, (x, shift, scale))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 6)}, r"x must have shape \(B, N, C\), got \(4, 6\)"),
        ({"shift": torch.zeros(2, 1, 5)}, r"shift must have shape .* = \(2, 1, 6\), got \(2, 1, 5\)"),
        ({"scale": torch.zeros(2, 1, 6, device="meta")}, "scale is on meta, but x is on cpu"),
        ({"backend": "cupy"}, "backend='cupy' needs tensors on a CUDA device, got device 'cpu'"),
    ],
)
def test_bad_input(change, message):
    x, shift, scale, _ = make_inputs((2, 4, 6), FP32)
    arguments = {"x": x, "shift": shift, "scale": scale, **change}
    with pytest.raises(ValueError, match=message):
        ada_layer_norm(**arguments)


@pytest.mark.parametrize(
    ("x", "modulation", "out", "fitting"),
    [
        (BF16, BF16, BF16, True),
        (FP32, FP32, BF16, True),
        (BF16, FP32, BF16, True),
        (FP32, BF16, FP32, False),
        (FP32, FP32, torch.float16, False),
        (BF16, BF16, FP32, False),
    ],
)
def test_what_the_kernels_take(x, modulation, out, fitting):
    tokens, table = torch.zeros(1, 2, 8, dtype=x), torch.zeros(1, 1, 8, dtype=modulation)
    assert kernels.fits(tokens, table, table, out) == fitting
    assert not kernels.fits(tokens[..., :6], table[..., :6], table[..., :6], out)
    assert not kernels.fits(tokens[:, :0], table, table, out)


def test_an_explicit_backend_is_never_replaced(monkeypatch):
    """Where the kernel does not fit, "cupy" says so and "auto" takes plain torch."""
    monkeypatch.setattr(sys.modules[ada_layer_norm.__module__], "choose_backend", lambda backend, x: "cupy")
    x, shift, scale, _ = make_inputs((2, 3, 6), FP32)
    with pytest.raises(ValueError, match=r"backend='cupy' needs a multiple of 4 channels, .* got 6 channels"):
        ada_layer_norm(x, shift, scale, backend="cupy")
    torch.testing.assert_close(
        ada_layer_norm(x, shift, scale), ada_layer_norm_reference(x, shift, scale, 1e-6)
    )


def test_what_begins_between_two_vectors_is_copied():
    whole = torch.zeros(2 * 3 * 8 + 1)
    for view, copied in ((whole[:-1].view(2, 3, 8), False), (whole[1:].view(2, 3, 8), True)):
        ready = kernels._aligned(view)
        assert ready.data_ptr() % 16 == 0
        assert (ready.data_ptr() != view.data_ptr()) == copied


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "dtype", "modulation", "out", "shared"),
    [
        ((2, 11, 20), BF16, None, BF16, False),  # rows that do not fill the last block
        ((1, 3, 1156), BF16, FP32, BF16, True),  # two warps a row, short vectors
        ((2, 3, 1544), BF16, None, BF16, False),  # two warps a row, long vectors
        ((3, 131, 40), BF16, FP32, BF16, False),  # three rows a warp, across the border of two pictures
        ((3, 20, 132), FP32, None, BF16, True),
        ((2, 7, 8), FP32, None, FP32, False),
    ],
)
def test_kernels(monkeypatch, shape, dtype, modulation, out, shared):
    x, shift, scale, dy = make_inputs(shape, dtype, modulation, shared)
    dy = dy.to(out)
    want = ground_truth(x, shift, scale, dy)
    wide = torch.full((shape[0], shape[1] + 1, shape[2] + 8), float("nan"), dtype=dtype)
    view = wide[:, 1:, 8:]
    view.copy_(x.detach())
    view.requires_grad_()
    with emulated(monkeypatch):
        y = kernels.AdaLayerNorm.apply(view, shift, scale, 1e-6, out)
        grads = torch.autograd.grad(y, (view, shift, scale), dy)
    assert y.dtype == out
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[out]
    for name, source, got in zip(NAMES, (view, shift, scale), grads, strict=True):
        assert (got.dtype, got.shape) == (source.dtype, source.shape)
        assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[dtype], name


@needs_compiler
def test_the_operators_results_share_no_memory(monkeypatch):
    """torch refuses operators that return two views of one tensor."""
    x, shift, scale, dy = (t.detach() for t in make_inputs((2, 5, 8), FP32))
    with emulated(monkeypatch):
        _, stats = kernels.normalise(x, shift, scale, 1e-6, FP32, True)
        results = kernels.ada_layer_norm_backward._init_fn(dy, x, shift, scale, stats, [True] * 3)
        plain = kernels.gradients(dy, x, shift, scale, stats, (True, True, True))
    assert len({t.untyped_storage().data_ptr() for t in (*results, dy, x, shift, scale, stats)}) == 8
    for got, want, like in zip(results, plain, (x, shift, scale), strict=True):
        assert got.stride() == like.stride()  # as the fake kernel says
        torch.testing.assert_close(got, want)
