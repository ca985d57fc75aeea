"""The kernels and their launches on the processor, every thread emulated, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulate import SHARED_LIMIT, emulated, needs_compiler
from scan_cases import BACKWARD_TOLERANCE, FORWARD_TOLERANCE, ground_truth, make_inputs, relative_error
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.launches import describe
from gspn2_diffusion.ops.line_scan import line_scan
from gspn2_diffusion.ops.plane_plans import PlaneTile, fits_planes, plane_plan
from gspn2_diffusion.ops.plans import Problem, generic_plan
from gspn2_diffusion.ops.torch_library import LineScan

pytestmark = needs_compiler

CASES = [  # (H, W), C, G, channels of a vector, chunk, dtype, options of the inputs
    ((5, 9), 24, 2, 4, 0, torch.bfloat16, {}),
    ((9, 5), 7, 7, 1, 3, torch.float32, {"with_u": False}),
    ((3, 11), 6, 1, 2, 2, torch.float32, {"normalize": False}),
]


@pytest.fixture(autouse=True)
def processor(monkeypatch):
    with emulated(monkeypatch):
        yield


def strided(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values as views of wider tensors, so that no two strides follow from each other."""

    def wide(t: Tensor) -> Tensor:
        big = torch.full((*t.shape[:-1], t.shape[-1] + 16), float("nan"), dtype=t.dtype)
        big[..., : t.shape[-1]] = t.detach()
        return big[..., : t.shape[-1]]

    return {name: None if t is None else wide(t) for name, t in inputs.items()}


PLANES = [  # (H, W), tile, chunk, dtype, options of the inputs
    ((20, 136), PlaneTile(1), 0, torch.bfloat16, {}),
    ((140, 24), PlaneTile(1), 8, torch.bfloat16, {"with_u": False}),
    ((4, 264), PlaneTile(4), 16, torch.bfloat16, {"normalize": False}),
    ((8, 140), PlaneTile(2), 0, torch.float32, {}),
]


@pytest.mark.parametrize(("size", "tile", "chunk", "dtype", "kind"), PLANES)
def test_one_channel(size, tile, chunk, dtype, kind):
    inputs = make_inputs(2, *size, 1, dtype=dtype, **kind)
    with torch.no_grad():
        inputs["weight"][:, 0, :, 0] = inputs["weight"][:, -1, :, 1] = float(
            "inf"
        )  # of first lines: not used
        inputs = {n: t if n == "x" or t is None else rows_in_one_piece(t) for n, t in inputs.items()}
    normalize = kind.get("normalize", True)
    problem = Problem(2, *size, 1, 1, (0, 1, 2, 3), chunk, dtype.itemsize, False)
    plan = plane_plan(problem, tile, normalize, SHARED_LIMIT)
    setting = ((0, 1, 2, 3), chunk, normalize)
    y, state = scan_kernels.line_scan_forward(*inputs.values(), *setting, True, plan=plan)
    assert y.stride() == inputs["lam"].stride()
    options = {"chunk_size": chunk or None, "normalize": normalize}
    for got, gate in ((y, inputs["u"]), (y if state is None else state, None)):
        want = ground_truth({**inputs, "u": gate}, torch.zeros_like(y), **options)["y"]
        assert relative_error(got, want) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(("size", "tile", "chunk", "dtype", "kind"), PLANES)
def test_gradients_of_one_channel(size, tile, chunk, dtype, kind):
    inputs = make_inputs(2, *size, 1, dtype=dtype, **kind)
    inputs = {n: t if n == "x" or t is None else rows_in_one_piece(t.detach()) for n, t in inputs.items()}
    x, weight, lam, u = inputs.values()
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = (t.double() for t in (x, weight, lam))
    state = line_scan(*exact, None, backend="reference", **options).to(dtype)
    dy, state = rows_in_one_piece(dy), rows_in_one_piece(state)
    problem = Problem(2, *size, 1, 1, (0, 1, 2, 3), chunk, dtype.itemsize, True)
    plan = plane_plan(problem, tile, normalize, SHARED_LIMIT)
    assert plan is not None
    setting = ((0, 1, 2, 3), chunk, normalize)
    grads = scan_kernels.line_scan_backward(dy, *inputs.values(), state, *setting, plan=plan)
    assert grads[1].stride() == weight.stride()
    want = ground_truth(inputs, dy, **options)
    for name, got in zip(("dx", "dweight", "dlam", "du"), grads, strict=True):
        if got is None:
            assert name == "du"
            assert u is None
        else:
            assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[dtype], name


def test_gradients_of_one_channel_by_default(monkeypatch):
    """Views of wider tensors, weights that the batch shares, directions in another order, some gradients."""
    inputs = make_inputs(2, 20, 24, 1, directions=3, dtype=torch.bfloat16)
    apart = {n: t.detach() if n == "x" else rows_in_one_piece(t.detach()) for n, t in inputs.items()}
    x, weight, lam, u = (t[:, :16, 8:24] for t in apart.values())
    weight = weight[:1].expand_as(weight)
    dy, state = (rows_in_one_piece(torch.randn_like(lam, dtype=torch.float32).bfloat16()) for _ in range(2))
    sources = note_sources(monkeypatch)
    options = ((2, 0, 3), 0, True)
    exact = line_scan(
        x.double(), weight.double(), lam.double(), directions=("right", "down", "left"), backend="reference"
    )
    state.copy_(exact)
    grads = scan_kernels.line_scan_backward(dy, x, weight, lam, u, state, *options)
    assert sources == ["line_scan_backward_plane", "line_scan_finish"]
    tensors = {"x": x, "weight": weight, "lam": lam, "u": u}
    want = ground_truth(tensors, dy, directions=("right", "down", "left"))
    for name, got in zip(tensors, grads, strict=True):
        assert relative_error(got, want[f"d{name}"]) <= BACKWARD_TOLERANCE[torch.bfloat16], name
    for wanted in ((True, False, False, True), (False, True, True, False)):
        some = scan_kernels.line_scan_backward(dy, x, weight, lam, u, state, *options, wanted)
        for full, got, want_it in zip(grads, some, wanted, strict=True):
            assert torch.equal(got, full) if want_it else got is None


def note_sources(monkeypatch) -> list[str]:
    """The kernels that will be made ready, in order."""
    sources, start = [], cupy_backend.starter

    def noted(plan, *of):
        sources.append(plan.source)
        return start(plan, *of)

    monkeypatch.setattr(cupy_backend, "starter", noted)
    return sources


def rows_in_one_piece(t: Tensor) -> Tensor:
    """The same values with the directions outermost."""
    return t.movedim(3, 0).contiguous().movedim(0, 3)


@pytest.mark.parametrize("shift", [0, 1])
def test_one_channel_by_default(monkeypatch, shift):
    """The plane kernel takes rows in one piece each, the generic one what does not start at 16 bytes."""
    inputs = make_inputs(1, 12, 16, 1, dtype=torch.bfloat16)
    inputs = {n: t if n == "x" else rows_in_one_piece(t.detach()) for n, t in inputs.items()}
    weight = inputs["weight"]
    moved = torch.empty(weight.numel() + shift, dtype=weight.dtype)[shift:]
    inputs["weight"] = moved.as_strided(weight.shape, weight.stride()).copy_(weight)
    sources = note_sources(monkeypatch)
    y, state = scan_kernels.line_scan_forward(*inputs.values(), (0, 1, 2, 3), 0, True, True)
    assert sources == ["line_scan_forward" if shift else "line_scan_forward_plane"]
    assert state is not None
    want = ground_truth(inputs, torch.zeros_like(y))["y"]
    assert relative_error(y, want) <= FORWARD_TOLERANCE[torch.bfloat16]


def test_which_layouts_the_plane_kernel_takes():
    problem = Problem(2, 12, 16, 1, 1, (0, 1, 2, 3), 0, 2, False)
    inputs = make_inputs(2, 12, 16, 1, dtype=torch.bfloat16)
    apart = {n: t if n == "x" else rows_in_one_piece(t) for n, t in inputs.items()}

    def fits(tensors, alignment=0, problem=problem):
        strides = [tensors[n].stride()[:-1] for n in ("x", "lam", "u")]
        return fits_planes(problem, strides, tensors["weight"].stride(), alignment)

    assert fits(apart)
    assert not fits(inputs)  # directions side by side
    assert not fits(apart, alignment=8)
    cropped = {n: t[:, :, 4:12] for n, t in apart.items()}
    assert fits(cropped, problem=replace(problem, width=8))
    odd = {n: t[:, :, :15].contiguous() for n, t in apart.items()}
    assert not fits(odd, problem=replace(problem, width=15))
    assert not fits(apart, problem=replace(problem, chunk=4))
    assert not fits(apart, problem=replace(problem, channels=2))


def make_plan(x: Tensor, groups: int, vec: int, chunk: int, backward: bool):
    problem = Problem(*x.shape, groups, (0, 1, 2, 3), chunk, x.dtype.itemsize, backward)
    return generic_plan(problem, vec, SHARED_LIMIT)


@pytest.mark.parametrize(("size", "channels", "groups", "vec", "chunk", "dtype", "kind"), CASES)
def test_forward(size, channels, groups, vec, chunk, dtype, kind):
    inputs = strided(make_inputs(2, *size, channels, groups, dtype=dtype, **kind))
    normalize = kind.get("normalize", True)
    plan = make_plan(inputs["x"], groups, vec, chunk, False)
    y, state = scan_kernels.line_scan_forward(
        *inputs.values(), (0, 1, 2, 3), chunk, normalize, True, plan=plan
    )
    options = {"chunk_size": chunk or None, "normalize": normalize}
    for got, gate in ((y, inputs["u"]), (y if state is None else state, None)):
        want = ground_truth({**inputs, "u": gate}, torch.zeros_like(y), **options)["y"]
        assert relative_error(got, want) <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize(("size", "channels", "groups", "vec", "chunk", "dtype", "kind"), CASES)
def test_backward(size, channels, groups, vec, chunk, dtype, kind):
    inputs = strided(make_inputs(2, *size, channels, groups, dtype=dtype, **kind))
    x, weight, lam, u = inputs.values()
    normalize = kind.get("normalize", True)
    options = {"chunk_size": chunk or None, "normalize": normalize}
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = (t.double() for t in (x, weight, lam))
    state = line_scan(*exact, None, backend="reference", **options).to(dtype)
    plan = make_plan(x, groups, vec, chunk, True)
    setting = ((0, 1, 2, 3), chunk, normalize)
    grads = scan_kernels.line_scan_backward(dy, *inputs.values(), state, *setting, plan=plan)
    want = ground_truth(inputs, dy, **options)
    for name, got in zip(("dx", "dweight", "dlam", "du"), grads, strict=True):
        if got is None:
            assert name == "du"
            assert u is None
        elif want[name].norm() < 1e-12:  # the weights of a single line or of a single position
            assert torch.count_nonzero(got) == 0, name
        else:
            assert relative_error(got, want[name]) <= BACKWARD_TOLERANCE[dtype], name


@pytest.mark.parametrize("with_u", [True, False])
def test_gradients_through_autograd(with_u):
    """The function of eager calls, with the plan that is chosen and directions in another order."""
    inputs = make_inputs(2, 5, 6, 6, 2, with_u=with_u)
    launch = scan_kernels.kept_launch(describe(*inputs.values(), (2, 0, 3, 1), 0, True))
    y = LineScan.apply(launch, *inputs.values())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    leaves = {name: t for name, t in inputs.items() if t is not None}
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    want = ground_truth(inputs, dy, directions=("right", "down", "left", "up"))
    assert relative_error(y, want["y"]) <= FORWARD_TOLERANCE[torch.float32]
    for name, got in zip(leaves, grads, strict=True):
        assert relative_error(got, want[f"d{name}"]) <= BACKWARD_TOLERANCE[torch.float32], name


def test_coefficients_of_any_size():
    """Alike or not, near zero or huge: only their differences count where all sigmoids are nearly zero."""
    inputs = make_inputs(1, 6, 8, 8)
    x, weight, lam, _ = inputs.values()
    with torch.no_grad():
        weight.mul_(60).sub_(200)
        weight[:, 2] = -1e30
        weight[:, 3, 4, ..., 1] = -1e20
        weight[:, 4, 2:4] = 1e30
    plan = make_plan(x, 1, 4, 0, False)
    y, _ = scan_kernels.line_scan_forward(x, weight, lam, None, (0, 1, 2, 3), 0, True, False, plan=plan)
    want = ground_truth({**inputs, "u": None}, torch.zeros_like(y))["y"]
    assert relative_error(y, want) <= FORWARD_TOLERANCE[torch.float32]


@pytest.mark.parametrize("wanted", [(True, False, False, False), (False, True, True, False)])
def test_gradients_that_are_not_wanted_are_left_out(wanted):
    inputs = make_inputs(1, 5, 6, 3)
    state = torch.rand_like(inputs["lam"])
    options = ((0, 1, 2, 3), 0, True)
    every = scan_kernels.line_scan_backward(state, *inputs.values(), state, *options)
    some = scan_kernels.line_scan_backward(state, *inputs.values(), state, *options, wanted)
    for full, got, want in zip(every, some, wanted, strict=True):
        assert (got is not None) == want
        assert got is None or torch.equal(got, full)


def test_kept_launches_take_other_addresses_and_layouts():
    """Calls of the same shape share a launch; another layout or alignment does not."""
    for seed, offset in ((0, 0), (1, 0), (2, 1), (3, 0)):
        inputs = make_inputs(1, 4, 5, 2, seed=seed)
        if offset:  # an address that no vector of two floats may start at
            inputs["x"] = torch.cat((torch.zeros(1), inputs["x"].flatten()))[1:].view(1, 4, 5, 2)
        if seed == 3:
            inputs["lam"] = inputs["lam"].transpose(1, 2).contiguous().transpose(1, 2)
        y, _ = scan_kernels.line_scan_forward(*inputs.values(), (0, 1, 2, 3), 0, True, False)
        want = ground_truth(inputs, torch.zeros_like(y))["y"]
        assert relative_error(y, want) <= FORWARD_TOLERANCE[torch.float32]
        assert y.stride() == inputs["lam"].stride()
