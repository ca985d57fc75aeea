"""The CUDA kernels against the float64 reference, and how they behave inside torch."""

from __future__ import annotations

import pytest
import torch
from scan_cases import (
    ARGUMENTS,
    BACKWARD_TOLERANCE,
    FORWARD_TOLERANCE,
    SHAPES,
    SUBSETS,
    assert_matches,
    ground_truth,
    make_inputs,
    relative_error,
    run,
)

from gspn2_diffusion import line_scan
from gspn2_diffusion.ops import cupy_backend, torch_library
from gspn2_diffusion.ops.plans import Problem, generic_plan

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize(
    ("channels", "groups"), [(1, 1), (5, 1), (40, 1), (48, 1), (6, 2), (16, 2), (7, 7), (8, 8)]
)
def test_shapes(size, channels, groups, dtype):
    assert_matches(make_inputs(2, *size, channels, groups, dtype=dtype, device="cuda"), "cupy")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 1152])
@pytest.mark.parametrize("size", [(9, 12), (64, 64)])
def test_many_channels(size, groups, dtype):
    assert_matches(make_inputs(1, *size, 1152, groups, dtype=dtype, device="cuda"), "cupy")


@pytest.mark.parametrize("directions", SUBSETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_subset_of_directions(directions, dtype):
    inputs = make_inputs(2, 33, 20, 12, directions=len(directions), dtype=dtype, device="cuda")
    assert_matches(inputs, "cupy", directions=directions)


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("size", [(1, 7), (33, 65), (70, 129)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks(chunk_size, size, dtype):
    assert_matches(make_inputs(2, *size, 24, 2, dtype=dtype, device="cuda"), "cupy", chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_u", [True, False])
def test_options(dtype, normalize, with_u):
    inputs = make_inputs(2, 19, 23, 40, dtype=dtype, device="cuda", with_u=with_u, normalize=normalize)
    assert_matches(inputs, "cupy", normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_line_too_long_for_shared_memory(dtype):
    inputs = make_inputs(1, 3, 40_000, 3, directions=2, dtype=dtype, device="cuda")
    problem = Problem(1, 3, 40_000, 3, 1, (0, 1), 0, dtype.itemsize, False)
    assert generic_plan(problem, 1, cupy_backend.shared_limit(0)).scratch_floats > 0
    assert_matches(inputs, "cupy", directions=("down", "up"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_without_copies(dtype, monkeypatch):
    """lam, u and weight as slices of one projection, x as a slice of something wider, dy expanded."""
    batch, height, width, channels, d = 2, 11, 13, 16, 4
    projected = torch.randn(batch, height, width, d * (2 * channels + 3), device="cuda", dtype=dtype)
    lam, u, weight = projected.split([d * channels, d * channels, d * 3], dim=-1)
    wide = torch.randn(batch, width, height, 3 * channels, device="cuda", dtype=dtype).transpose(1, 2)
    inputs = {
        "x": wide[..., channels : 2 * channels],
        "weight": weight.unflatten(-1, (d, 1, 3)),
        "lam": lam.unflatten(-1, (d, channels)),
        "u": u.unflatten(-1, (d, channels)),
    }
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    assert not any(inputs[name].is_contiguous() for name in ("x", "weight", "lam", "u"))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *a, **k: pytest.fail("a copy was made"))
    assert_matches(inputs, "cupy")


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(dtype):
    """An odd offset and odd strides, where vectors of more than one element would be misaligned."""
    inputs = {}
    for name, t in make_inputs(2, 9, 10, 16, dtype=dtype, device="cuda").items():
        padded = torch.randn(*t.shape[:-1], t.shape[-1] + 3, device="cuda", dtype=dtype)
        inputs[name] = padded[..., 1 : 1 + t.shape[-1]].detach().requires_grad_()
    assert_matches(inputs, "cupy")


def test_other_layouts_are_copied():
    inputs = make_inputs(2, 6, 7, 8, device="cuda")
    strided = {k: v.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for k, v in inputs.items()}
    assert strided["x"].stride(-1) != 1
    assert_matches({k: v.requires_grad_() for k, v in strided.items()}, "cupy")


@pytest.mark.parametrize("channels", [1, 8, 24])
def test_directions_outermost_in_memory(channels):
    """The results follow the gates' layout."""
    inputs = make_inputs(2, 33, 70, channels, dtype=torch.bfloat16, device="cuda")

    def outermost(t):
        return t.detach().movedim(3, 0).contiguous().movedim(0, 3).requires_grad_()

    inputs = {name: t if name == "x" else outermost(t) for name, t in inputs.items()}
    y = line_scan(**inputs, backend="cupy")
    assert y.stride() == inputs["lam"].stride()
    assert_matches(inputs, "cupy")


@pytest.mark.parametrize("kind", ["zero strides", "reversed"])
def test_gradient_of_any_layout(kind):
    inputs = make_inputs(2, 6, 7, 8, device="cuda")
    y = line_scan(**inputs, backend="cupy")
    dy = (
        torch.ones((), device="cuda").expand(y.shape)
        if kind == "zero strides"
        else torch.randn(y.shape[::-1], device="cuda").permute(4, 3, 2, 1, 0)
    )
    got = torch.autograd.grad(y, list(inputs.values()), dy)
    want = run(inputs, dy.contiguous(), backend="reference")
    for name, value in zip(ARGUMENTS, got, strict=True):
        torch.testing.assert_close(value, want[f"d{name}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(dtype):
    inputs = make_inputs(2, 67, 130, 48, dtype=dtype, device="cuda")
    dy = torch.randn(2, 67, 130, 4, 48, device="cuda", dtype=dtype)
    first = run(inputs, dy, backend="cupy")
    for _ in range(50):
        again = run(inputs, dy, backend="cupy")
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@torch.no_grad()
@pytest.mark.parametrize("axis", ["left-right", "up-down", "transpose"])
def test_mirror(axis):
    inputs = make_inputs(2, 21, 21, 8, device="cuda")
    mirror, order, swapped = {
        "left-right": (lambda t: t.flip(2), [0, 1, 3, 2], [0, 1]),
        "up-down": (lambda t: t.flip(1), [1, 0, 2, 3], [2, 3]),
        "transpose": (lambda t: t.transpose(1, 2), [2, 3, 0, 1], []),
    }[axis]
    mirrored = {k: mirror(v) if k == "x" else mirror(v)[:, :, :, order] for k, v in inputs.items()}
    weight = mirrored["weight"].clone()
    for d in swapped:
        weight[:, :, :, d] = weight[:, :, :, d].flip(-1)
    result = line_scan(**{**mirrored, "weight": weight}, backend="cupy")
    expected = mirror(line_scan(**inputs, backend="cupy"))[:, :, :, order]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_runs_on_the_current_stream():
    """A scan on a side stream waits for that stream's work and for no other's."""
    inputs = {k: v.detach() for k, v in make_inputs(4, 64, 64, 32, device="cuda").items()}
    expected = line_scan(**inputs, backend="reference")
    line_scan(**inputs, backend="cupy")  # compiles the kernel, which takes longer than the pause below
    stream = torch.cuda.Stream()
    late = torch.zeros_like(inputs["x"])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # a quarter of a second: the input is written long after the launch
        late.copy_(inputs["x"])
        y = line_scan(**{**inputs, "x": late}, backend="cupy")
    assert not stream.query()  # the launch did not wait
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_cuda_graph():
    inputs = make_inputs(2, 32, 32, 16, device="cuda", dtype=torch.bfloat16)
    static = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    dy = torch.randn(2, 32, 32, 4, 16, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, dy, backend="cupy")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, dy, backend="cupy")
    fresh = make_inputs(2, 32, 32, 16, device="cuda", dtype=torch.bfloat16, seed=5)
    with torch.no_grad():
        for name, t in static.items():
            t.copy_(fresh[name])
    graph.replay()
    for name, value in run(fresh, dy, backend="cupy").items():
        assert torch.equal(captured[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = make_inputs(2, 16, 16, 8, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        y = line_scan(**inputs, backend="cupy")
    assert y.dtype == dtype
    expected = line_scan(**{k: v.to(dtype) for k, v in inputs.items()}, backend="cupy")
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current():
    inputs = make_inputs(2, 31, 33, 24, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert_matches(inputs, "cupy")
    assert line_scan(**inputs, backend="auto").device == torch.device("cuda:1")


@pytest.mark.parametrize("with_u", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(with_u, requires_grad):
    inputs = make_inputs(2, 5, 6, 8, 2, device="cuda", with_u=with_u)
    tensors = [None if t is None else t.detach().requires_grad_(requires_grad) for t in inputs.values()]
    torch.use_deterministic_algorithms(False)
    args = (*tensors, [0, 1, 2, 3], 0, True, requires_grad)
    torch.library.opcheck(torch_library.line_scan_forward, args)


@pytest.mark.parametrize("with_u", [True, False])
def test_compile_fullgraph(with_u):
    inputs = make_inputs(2, 12, 9, 8, device="cuda", with_u=with_u)
    torch.use_deterministic_algorithms(False)

    def function(**tensors):
        return line_scan(**tensors, backend="auto").square()

    compiled = torch.compile(function, fullgraph=True)
    tensors = [t for t in inputs.values() if t is not None]
    expected, got = function(**inputs), compiled(**inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_explicit_backend_is_never_replaced():
    inputs = make_inputs(1, 4, 4, 2, device="cuda", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"backend='cupy' takes .* got torch\.float64"):
        line_scan(**inputs, backend="cupy")
    assert line_scan(**inputs, backend="auto").dtype == torch.float64


def test_tensors_on_different_devices():
    inputs = make_inputs(1, 4, 4, 2, device="cuda")
    with pytest.raises(ValueError, match="lam is on cpu, but x is on cuda:0"):
        line_scan(**{**inputs, "lam": inputs["lam"].cpu()})


def test_no_state_is_kept_for_inference():
    inputs = make_inputs(1, 64, 64, 32, device="cuda")
    with torch.no_grad():
        _, state = torch_library.line_scan_forward(*inputs.values(), [0, 1, 2, 3], 0, True, False)
    assert state.numel() == 0


def test_calls_that_are_known_already():
    """Calls of the same shapes share a launch; other layouts, alignments, options, devices have their own."""
    from gspn2_diffusion.ops.line_scan import _kept

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    plain = {n: t.detach() for n, t in make_inputs(2, 9, 12, 16, device="cuda").items()}
    cases = [
        (plain, {}),
        ({**plain, "x": shifted(plain["x"])}, {}),
        ({**plain, "weight": shifted(plain["weight"])}, {}),
        ({**plain, "lam": plain["lam"].transpose(1, 2).contiguous().transpose(1, 2)}, {}),
        ({**plain, "u": None}, {"chunk_size": 4}),
        ({n: t.bfloat16() for n, t in plain.items()}, {"normalize": False}),
        (plain, {"directions": ("left", "down", "up", "right")}),
    ]
    if torch.cuda.device_count() > 1:
        cases.append(({n: t.to("cuda:1") for n, t in plain.items()}, {}))
    expected = []
    for inputs, options in cases:
        _kept.clear()
        expected.append(line_scan(**inputs, **options))
        assert len(_kept) == 1
    _kept.clear()
    for _ in range(3):
        for (inputs, options), want in zip(cases, expected, strict=True):
            doubled = {**inputs, "x": inputs["x"] * 2}  # at another address
            if inputs["x"].data_ptr() % 16 == 0:
                torch.testing.assert_close(line_scan(**doubled, **options), want * 2)
            assert torch.equal(line_scan(**inputs, **options), want)
    assert len(_kept) == len(cases)
    with pytest.raises(ValueError, match="lam must have shape"):
        line_scan(**{**plain, "lam": plain["lam"][:, :8]})
    with pytest.raises(TypeError, match=r"u has dtype torch\.bfloat16"):
        line_scan(**{**plain, "u": plain["u"].bfloat16()})
    assert line_scan(**{**plain, "x": plain["x"].requires_grad_()}).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_training_calls_that_are_known_already(autocast):
    """They use the launches of inference, also with tensors that were cast or copied."""
    from gspn2_diffusion.ops.line_scan import _kept

    dtype = torch.bfloat16 if autocast else torch.float32
    inputs = make_inputs(2, 9, 12, 16, device="cuda")
    spread = torch.stack((inputs["u"].detach(),) * 2, dim=-1)[..., 0].requires_grad_()  # of stride 2
    inputs["u"] = spread
    dy = torch.randn(spread.shape, device="cuda").to(dtype)
    _kept.clear()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        got = [run(inputs, dy, backend="cupy") for _ in range(3)]
        with torch.no_grad():
            y = line_scan(**inputs, backend="cupy")
    assert len(_kept) == 1
    assert torch.equal(y, got[0]["y"])
    assert y.dtype == dtype
    for name, first in got[0].items():
        assert first.dtype == (dtype if name == "y" else torch.float32)
        assert all(torch.equal(first, other[name]) for other in got[1:]), name
    want = ground_truth({name: t.to(dtype) for name, t in inputs.items()}, dy)
    for name, value in got[0].items():
        tolerance = (FORWARD_TOLERANCE if name == "y" else BACKWARD_TOLERANCE)[dtype]
        assert relative_error(value, want[name]) <= tolerance, name
