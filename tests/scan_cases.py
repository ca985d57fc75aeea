"""Inputs, ground truth and tolerances shared by the line-scan tests."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from gspn2_diffusion.ops.line_scan import DIRECTIONS, line_scan
from gspn2_diffusion.ops.plans import Plan, Problem, Tile, tiled_plan

# ||out - ref|| / ||ref|| against the float64 reference on the same (rounded) inputs.
FORWARD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}
BACKWARD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float64: 1e-12}

SHAPES = [(1, 1), (1, 7), (7, 1), (33, 65), (64, 64), (1023, 17), (1100, 40)]
SUBSETS = [s for n in range(1, 5) for s in itertools.combinations(DIRECTIONS, n)]
ARGUMENTS = ("x", "weight", "lam", "u")


def plan_with_ring(
    problem: Problem, tile: Tile, normalize: bool, limit: int, ring: int | None = None
) -> Plan:
    """A tiled plan with so many stages in shared memory, for which a GPU may need to have less of it."""
    plan = tiled_plan(problem, tile, normalize, limit)
    if plan is not None and ring is not None and plan.ring > ring:
        plan = tiled_plan(problem, tile, normalize, plan.shared_bytes - 1)
    assert plan is not None
    assert ring in (None, plan.ring)
    return plan


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, memory that torch allocates without a value is NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def make_inputs(
    batch: int,
    height: int,
    width: int,
    channels: int,
    groups: int = 1,
    directions: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    with_u: bool = True,
    normalize: bool = True,
) -> dict[str, Tensor | None]:
    """Random leaf tensors with gradients; without ``normalize`` the weights keep the scan stable."""
    g = torch.Generator().manual_seed(seed)
    gate = (batch, height, width, directions, channels)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        return value.to(device=device, dtype=dtype).requires_grad_()

    return {
        "x": leaf(batch, height, width, channels),
        "weight": leaf(batch, height, width, directions, groups, 3, scale=2.0 if normalize else 0.3),
        "lam": leaf(*gate),
        "u": leaf(*gate) if with_u else None,
    }


def directions_outermost(t: Tensor) -> Tensor:
    """A tensor ``(B, H, W, D, ...)`` with the directions outermost in memory."""
    return t.movedim(3, 0).contiguous().movedim(0, 3)


def run(inputs: dict[str, Tensor | None], dy: Tensor, **options: object) -> dict[str, Tensor]:
    """``y`` and the gradient of ``(y * dy).sum()`` in every input."""
    y = line_scan(**inputs, **options)
    names = [name for name in ARGUMENTS if inputs[name] is not None]
    leaves = [inputs[name] for name in names]
    # A picture of one line never uses its weights.
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}


def ground_truth(inputs: dict[str, Tensor | None], dy: Tensor, **options: object) -> dict[str, Tensor]:
    exact = {name: None if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}
    return run(exact, dy.double(), backend="reference", **options)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """Relative error in the norm; NaN anywhere gives infinity."""
    out, ref = out.double(), ref.double()
    if not torch.isfinite(out).all():
        return float("inf")
    return ((out - ref).norm() / ref.norm().clamp_min(1e-30)).item()


def assert_matches(inputs: dict[str, Tensor | None], backend: str, **options: object) -> None:
    """Output and every gradient of ``backend`` against the float64 reference."""
    x = inputs["x"]
    directions = options.get("directions", DIRECTIONS)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(*x.shape[:3], len(directions), x.shape[3], generator=g, dtype=torch.float64)
    dy = dy.to(device=x.device, dtype=x.dtype)
    got = run(inputs, dy, backend=backend, **options)
    want = ground_truth(inputs, dy, **options)
    for name, value in got.items():
        assert value.dtype == x.dtype, name
        assert value.shape == want[name].shape, name
        tolerance = (FORWARD_TOLERANCE if name == "y" else BACKWARD_TOLERANCE)[x.dtype]
        if want[name].norm() < 1e-12:  # such as the weights' gradient on a picture of one line
            assert torch.count_nonzero(value) == 0, name
        else:
            error = relative_error(value, want[name])
            assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
