"""The local perception kernels against the float64 reference, and how they behave inside torch."""

from __future__ import annotations

import pytest
import torch
from local_perception_cases import NAMES, ground_truth, make_inputs, spread
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, relative_error

from gspn2_diffusion.layers.feed_forward import LocalPerceptionUnit
from gspn2_diffusion.ops import local_perception_kernels as kernels
from gspn2_diffusion.ops.local_perception import local_perception

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1, 1, 4), (1, 33, 65, 8), (2, 64, 64, 48), (1, 7, 130, 5), (3, 40, 3, 384), (2, 19, 10, 1152)]


def check(inputs: list[torch.Tensor], x: torch.Tensor, dy: torch.Tensor) -> None:
    """The result and every gradient; ``x`` and ``dy`` have the values of the inputs in another layout."""
    _, weight, bias, _ = inputs
    want = ground_truth(*inputs)
    x = x.detach().requires_grad_()
    y = local_perception(x, weight, bias, backend="cupy")
    grads = torch.autograd.grad(y, (x, weight, bias), dy)
    assert y.dtype == x.dtype
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[x.dtype]
    for name, source, got in zip(NAMES, (x, weight, bias), grads, strict=True):
        assert got.dtype == source.dtype
        assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[x.dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("views", [False, True])
def test_shapes(shape, dtype, views):
    inputs = make_inputs(shape, dtype, device="cuda")
    x, dy = (spread(t) if views else t for t in (inputs[0], inputs[3]))
    check(inputs, x, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_float32(dtype):
    inputs = make_inputs((2, 20, 21, 96), dtype, torch.float32, device="cuda")
    check(inputs, inputs[0], inputs[3])


def test_unaligned_channels_and_a_gradient_without_strides():
    inputs = make_inputs((1, 6, 7, 8), torch.bfloat16, device="cuda")
    padded = torch.zeros(1, 6, 7, 9, device="cuda", dtype=torch.bfloat16)
    padded[..., 1:] = inputs[0].detach()
    inputs[3] = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(1, 6, 7, 8)
    check(inputs, padded[..., 1:], inputs[3])


def test_same_bits_every_time():
    x, weight, bias, dy = make_inputs((4, 67, 33, 96), torch.bfloat16, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        y = local_perception(x, weight, bias, backend="cupy")
        return y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_only_the_gradients_that_are_wanted():
    x, weight, bias, dy = make_inputs((1, 8, 8, 16), torch.float32, device="cuda")
    frozen = local_perception(x, weight.detach(), bias.detach(), backend="cupy")
    plain = local_perception(x.detach(), weight, bias, backend="cupy")
    want = ground_truth(x, weight, bias, dy)
    torch.testing.assert_close(torch.autograd.grad(frozen, x, dy)[0], want["x"].float())
    torch.testing.assert_close(torch.autograd.grad(plain, bias, dy)[0], want["bias"].float())


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_step(autocast):
    """In one graph; the unit keeps the dtype of the tokens under autocast."""
    torch.use_deterministic_algorithms(False)
    unit = LocalPerceptionUnit(32, backend="auto").cuda()
    x, dy = (torch.randn(2, 12 * 9, 32, device="cuda") for _ in range(2))
    found = []
    for run in (unit, torch.compile(unit, fullgraph=True)):
        tokens = x.clone().requires_grad_()
        unit.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = run(tokens, 12, 9)
        y.backward(dy)
        assert y.dtype == torch.float32
        found.append((y.detach(), tokens.grad, unit.conv.weight.grad.clone(), unit.conv.bias.grad.clone()))
    unit.backend = "reference"
    want = unit(x, 12, 9)
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)
    torch.testing.assert_close(found[0][0], want, rtol=1e-4, atol=1e-5)


def test_opcheck():
    inputs = make_inputs((2, 5, 6, 8), torch.float32, device="cuda")[:3]
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(kernels.local_perception, tuple(inputs))


def test_cuda_graph_and_empty_pictures():
    x, weight, bias, _ = (t.detach() for t in make_inputs((1, 32, 32, 64), torch.bfloat16, device="cuda"))
    local_perception(x, weight, bias, backend="cupy")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = local_perception(x, weight, bias, backend="cupy")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, local_perception(x, weight, bias, backend="cupy"))
    assert local_perception(x[:0], weight, bias, backend="cupy").shape == (0, 32, 32, 64)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current():
    inputs = make_inputs((1, 9, 12, 16), torch.bfloat16, device="cuda:1")
    check(inputs, inputs[0], inputs[3])


def test_explicit_backend_is_never_replaced():
    x, weight, bias, _ = make_inputs((1, 4, 4, 2), torch.float64, device="cuda")
    with pytest.raises(TypeError, match=r"backend='cupy' takes .* got torch\.float64"):
        local_perception(x, weight, bias, backend="cupy")
    assert local_perception(x, weight, bias).dtype == torch.float64
