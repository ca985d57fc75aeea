"""The modulated layer norm's kernels against the float64 reference, and how they behave inside torch."""

from __future__ import annotations

import pytest
import torch
from ada_layer_norm_cases import NAMES, ground_truth, make_inputs
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, relative_error

from gspn2_diffusion.layers.block import GSPN2TransformerBlock, norm_and_modulate
from gspn2_diffusion.ops import ada_layer_norm_kernels as kernels
from gspn2_diffusion.ops.ada_layer_norm import ada_layer_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1, 4), (1, 1000, 20), (3, 77, 384), (2, 130, 1152), (1, 33, 2240), (1, 9, 4096), (2, 9001, 384)]


def check(inputs: list[torch.Tensor], x: torch.Tensor, out: torch.dtype) -> None:
    """The result and every gradient; ``x`` has the values of the input in another layout."""
    _, shift, scale, dy = inputs
    want = ground_truth(inputs[0], shift, scale, dy)
    x = x.detach().requires_grad_()
    y = ada_layer_norm(x, shift, scale, backend="cupy")
    grads = torch.autograd.grad(y, (x, shift, scale), dy)
    assert y.dtype == out
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[out]
    for name, source, got in zip(NAMES, (x, shift, scale), grads, strict=True):
        assert (got.dtype, got.shape) == (source.dtype, source.shape)
        assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[x.dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [False, True])
def test_shapes(shape, dtype, shared):
    inputs = make_inputs(shape, dtype, shared=shared, device="cuda")
    wide = torch.full((shape[0], shape[1] + 1, shape[2] + 8), float("nan"), dtype=dtype, device="cuda")
    view = wide[:, 1:, 8:]
    view.copy_(inputs[0].detach())
    check(inputs, view, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulation_of_float32(dtype):
    inputs = make_inputs((2, 40, 96), dtype, torch.float32, device="cuda")
    check(inputs, inputs[0], dtype)


def test_autocast_makes_bfloat16_of_float32():
    inputs = make_inputs((2, 40, 96), torch.float32, device="cuda")
    inputs[3] = inputs[3].bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        check(inputs, inputs[0], torch.bfloat16)


def test_same_bits_every_time():
    x, shift, scale, dy = make_inputs((4, 1000, 384), torch.bfloat16, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        y = ada_layer_norm(x, shift, scale, backend="cupy")
        return y.detach(), *torch.autograd.grad(y, (x, shift, scale), dy)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step(autocast):
    torch.use_deterministic_algorithms(False)
    norm = torch.nn.LayerNorm(32, eps=1e-6, elementwise_affine=False)
    x, shift, scale, dy = make_inputs((2, 50, 32), torch.float32, device="cuda")

    def function(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return norm_and_modulate(norm, x, shift, scale, "auto")

    found = []
    for run in (function, torch.compile(function, fullgraph=True)):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = run(x, shift, scale)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        found.append((y.detach(), *torch.autograd.grad(y, (x, shift, scale), dy.to(y.dtype))))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_opcheck():
    x, shift, scale, _ = make_inputs((2, 5, 8), torch.float32, device="cuda")
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(kernels.ada_layer_norm, (x, shift, scale, 1e-6, torch.bfloat16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current():
    inputs = make_inputs((1, 9, 16), torch.bfloat16, device="cuda:1")
    check(inputs, inputs[0], torch.bfloat16)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_with_every_kernel_is_the_block_in_plain_torch(autocast):
    """Output and gradients of the parameters; what stays in half precision is the blocks' own rounding."""
    torch.manual_seed(0)
    block = GSPN2TransformerBlock(64, 2, 2, 64, 2.0).cuda()
    torch.nn.init.normal_(block.scale_shift_table)
    x, text = torch.randn(2, 20 * 12, 64, device="cuda"), torch.randn(2, 7, 64, device="cuda")
    temb = torch.randn(2, 6 * 64, device="cuda")
    found = []
    for backend in ("reference", "cupy"):
        block.norm_backend = block.local_perception.backend = block.mixer.backend = backend
        block.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = block(x, text, None, temb, 20, 12)
        y.float().square().mean().backward()
        found.append([y.detach(), *(p.grad.clone() for p in block.parameters())])
    for plain, kernels_used in zip(*found, strict=True):
        assert relative_error(kernels_used, plain.double()) < (0.03 if autocast else 1e-4)
