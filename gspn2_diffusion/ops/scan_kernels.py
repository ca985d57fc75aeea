"""The line scan on CUDA tensors: allocates the outputs and launches the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.launches import (
    Call,
    Launch,
    Setting,
    backward_launch,
    describe,
    finish_launch,
    forward_launch,
)
from gspn2_diffusion.ops.plans import Plan


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where the last dimension's elements do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def line_scan_forward(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: Sequence[int],
    chunk_size: int,
    normalize: bool,
    save_state: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch of a forward kernel on torch's current stream.

    Args:
        directions: indices into ``("down", "up", "right", "left")``.
        chunk_size: 0 for none.
        save_state: keep the hidden states for the backward pass. Without ``u`` they are ``y`` itself.
        plan: instead of the one that is chosen by shape, for measurements.

    Returns:
        ``y (B, H, W, D, C)`` with its dimensions in memory in the order of those of ``lam``, and the hidden
        states laid out alike or None if none are kept apart from ``y``.
    """
    x, weight, lam = unit_last_stride(x), unit_last_stride(weight), unit_last_stride(lam)
    u = None if u is None else unit_last_stride(u)
    if x.numel() == 0:
        y = torch.empty_like(lam)
        return y, torch.empty_like(y) if save_state and u is not None else None
    call = describe(x, weight, lam, u, tuple(directions), chunk_size, normalize)
    return run_forward(kept_launch(call, plan), x, weight, lam, u, save_state)


def kept_launch(call: Call, plan: Plan | None = None) -> Launch:
    """What :func:`run_forward` takes; made once for every call and plan."""
    index = call.setting.device
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return kept_launch(call, plan)
    cupy_backend.bind(index)
    return forward_launch(call, plan)


def run_forward(
    launch: Launch, x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None, save_state: bool
) -> tuple[Tensor, Tensor | None]:
    """:func:`line_scan_forward` of tensors of which :func:`describe` tells what the launch was made for."""
    index = launch.device
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return run_forward(launch, x, weight, lam, u, save_state)
    y, state = torch.empty_like(lam), None
    at_u = at_state = 0
    if u is not None:
        at_u = u.data_ptr()
        if save_state:
            state = torch.empty_like(y)
            at_state = state.data_ptr()
    cupy_backend.bind(index)
    launch(x.data_ptr(), weight.data_ptr(), lam.data_ptr(), at_u, y.data_ptr(), at_state)
    return y, state


def line_scan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    state: Tensor,
    directions: Sequence[int],
    chunk_size: int,
    normalize: bool,
    wanted: Sequence[bool] = (True, True, True, True),
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """One launch of a backward kernel, and one that sums its partial results.

    Args:
        dy: ``(B, H, W, D, C)`` gradient of ``y``.
        state: the hidden states that :func:`line_scan_forward` kept.
        wanted: which gradients of ``x, weight, lam, u`` to compute.
        plan: instead of the one that is chosen by shape, for measurements.

    Returns:
        Gradients of ``x, weight, lam, u`` in the inputs' dtype, None where not wanted. Those of ``lam`` and
        ``u`` are laid out as ``state``, that of ``weight`` as it is or contiguous, that of ``x`` contiguous.
    """
    index = x.device.index
    if cupy_backend.current_device() != index:
        options = (directions, chunk_size, normalize, wanted, plan)
        with torch.cuda.device(index):
            return line_scan_backward(dy, x, weight, lam, u, state, *options)
    want_x, want_weight, want_lam, want_u = wanted
    dlam = torch.empty_like(state) if want_lam else None
    du = torch.empty_like(state) if want_u and u is not None else None
    if dy.numel() == 0:
        zeros = (torch.zeros_like(x) if want_x else None, torch.zeros_like(weight) if want_weight else None)
        return *zeros, dlam, du
    cupy_backend.bind(index)
    dy, x, weight, lam = (unit_last_stride(t) for t in (dy, x, weight, lam))
    u = None if u is None else unit_last_stride(u)
    setting = Setting(x.dtype, index, tuple(directions), chunk_size, normalize)
    pointers = tuple(map(_pointer, (dy, x, weight, lam, u, state)))
    at_weight = pointers[2] if x.shape[3] == 1 else 0
    launch = backward_launch(
        x.shape,
        weight.shape[4],
        setting,
        dy.stride(),
        x.stride(),
        weight.stride(),
        lam.stride(),
        None if u is None else u.stride(),
        state.stride(),
        torch.empty_like(weight, device="meta").stride() if x.shape[3] == 1 else weight.stride(),
        (pointers[0] | pointers[1] | pointers[3] | pointers[4] | pointers[5] | at_weight) % 16,
        plan,
    )
    dx, dweight = _partial_gradients(launch.plan, x, weight, want_x, want_weight)
    launch(*pointers, *map(_pointer, (dx, dweight, dlam, du)))
    if launch.plan.source in cupy_backend.GENERIC:
        dx = None if dx is None else dx.sum(0).to(x.dtype)
        dweight = None if dweight is None else dweight.sum(0).to(x.dtype)
    elif launch.plan.source in cupy_backend.PLANE:
        dx, _ = _finish(dx, None, x, weight, setting)
    else:
        dx, dweight = _finish(dx, dweight, x, weight, setting)
    return dx, dweight, dlam, du


def _partial_gradients(
    plan: Plan, x: Tensor, weight: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts of the gradients: of ``x`` by directions, of ``weight`` by slices of channels."""
    batch, height, width, directions, groups, _ = weight.shape
    generic = plan.source in cupy_backend.GENERIC
    dx = dweight = None
    if want_x:
        dtype = torch.float32 if generic else x.dtype
        dx = torch.empty((directions, *x.shape), dtype=dtype, device=x.device)
    if want_weight and plan.source in cupy_backend.PLANE:
        dweight = torch.empty_like(weight)  # not a part, but the whole
    elif want_weight:
        lines = (groups * plan.channel_slices, directions, batch, height * width * 3)
        shape = (plan.channel_slices, *weight.shape) if generic else lines
        dweight = torch.empty(shape, dtype=torch.float32, device=x.device)
    return dx, dweight


def _finish(
    dx_partial: Tensor | None, dweight_partial: Tensor | None, x: Tensor, weight: Tensor, setting: Setting
) -> tuple[Tensor | None, Tensor | None]:
    """Sum dx over the directions and dW over the channel slices, and take dW through the normalisation."""
    if dx_partial is None and dweight_partial is None:
        return None, None
    dx = None if dx_partial is None else x.new_empty(x.shape)
    dweight = None if dweight_partial is None else x.new_empty(weight.shape)
    slices = 0 if dweight_partial is None else dweight_partial.shape[0]
    launch = finish_launch(
        x.shape, weight.shape[4], setting, weight.stride(), slices, dx is not None, dweight is not None
    )
    launch(*map(_pointer, (dx_partial, dweight_partial, weight, dx, dweight)))
    return dx, dweight
