"""The CUDA kernels as torch operators: fake implementations for tracing, and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend

_NAMESPACE = "gspn2_diffusion"
_SCAN = "int[] directions, int chunk_size, bool normalize"


@torch.library.custom_op(
    f"{_NAMESPACE}::line_scan_forward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor x, Tensor weight, Tensor lam, Tensor? u, {_SCAN}, bool save_state) -> (Tensor, Tensor)",
)
def line_scan_forward(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
    save_state: bool,
) -> tuple[Tensor, Tensor]:
    return cupy_backend.line_scan_forward(x, weight, lam, u, directions, chunk_size, normalize, save_state)


@line_scan_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
    save_state: bool,
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    y = x.new_empty(batch, height, width, len(directions), channels)
    return y, torch.empty_like(y) if save_state and u is not None else x.new_empty(0)


@torch.library.custom_op(
    f"{_NAMESPACE}::line_scan_backward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor dy, Tensor x, Tensor weight, Tensor lam, Tensor? u, Tensor state, {_SCAN}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def line_scan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    state: Tensor,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cupy_backend.line_scan_backward(dy, x, weight, lam, u, state, directions, chunk_size, normalize)


@line_scan_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    state: Tensor,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape),
        x.new_empty(lam.shape),
        x.new_empty(0) if u is None else x.new_empty(u.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lam, u, directions, chunk_size, normalize, save_state = inputs
    y, state = output
    ctx.save_for_backward(x, weight, lam, u, y if u is None else state)  # without u, y is the state
    ctx.options = (directions, chunk_size, normalize)
    ctx.saved_state = save_state
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    if not ctx.saved_state:
        raise RuntimeError("line_scan_forward was called with save_state=False, so it has no gradient")
    x, weight, lam, u, state = ctx.saved_tensors
    dx, dweight, dlam, du = line_scan_backward(dy, x, weight, lam, u, state, *ctx.options)
    return dx, dweight, dlam, None if u is None else du, None, None, None, None


line_scan_forward.register_autograd(_backward, setup_context=_setup_context)
