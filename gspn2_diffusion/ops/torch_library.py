"""The CUDA kernels inside torch: an autograd function for eager calls, custom operators for tracing.

The operators have fake implementations and a gradient; the function does the same with less work on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspn2_diffusion.ops import scan_kernels
from gspn2_diffusion.ops.launches import Launch

_NAMESPACE = "gspn2_diffusion"
_INPUTS = "Tensor x, Tensor weight, Tensor lam, Tensor? u"
_SCAN = "int[] directions, int chunk_size, bool normalize"


class LineScan(torch.autograd.Function):
    """``apply(launch, x, weight, lam, u)`` returns ``y``; differentiable once."""

    @staticmethod
    def forward(ctx: Any, launch: Launch, *inputs: Any) -> Tensor:
        x, weight, lam, u = inputs
        ctx.setting = launch.setting
        y, state = scan_kernels.run_forward(launch, x, weight, lam, u, True)
        ctx.save_for_backward(x, weight, lam, u, y if u is None else state)  # without u, y is the state
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lam, u, state = ctx.saved_tensors
        _, _, directions, chunk, normalize = ctx.setting
        wanted = ctx.needs_input_grad[1:]
        return None, *scan_kernels.line_scan_backward(
            dy, x, weight, lam, u, state, directions, chunk, normalize, wanted
        )


@torch.library.custom_op(
    f"{_NAMESPACE}::line_scan_forward",
    mutates_args=(),
    device_types="cuda",
    schema=f"({_INPUTS}, {_SCAN}, bool save_state) -> (Tensor, Tensor)",
)
def line_scan_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    y, state = scan_kernels.line_scan_forward(x, *arguments)
    return y, x.new_empty(0) if state is None else state


@line_scan_forward.register_fake
def _(
    x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None, directions: list[int], *options: Any
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(scan_kernels.unit_last_stride(lam))
    save_state = options[-1]
    return y, torch.empty_like(y) if save_state and u is not None else x.new_empty(0)


@torch.library.custom_op(
    f"{_NAMESPACE}::line_scan_backward",
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor dy, {_INPUTS}, Tensor state, {_SCAN}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def line_scan_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dx, dweight, *others = scan_kernels.line_scan_backward(dy, *arguments)
    grads = (dx, None if dweight is None else dweight.contiguous(), *others)
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@line_scan_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None, state: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    kinds = (x.new_empty(x.shape), weight.new_empty(weight.shape), state, None if u is None else state)
    return tuple(
        torch.empty_like(kind) if want and kind is not None else dy.new_empty(0)
        for kind, want in zip(kinds, options[-1], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, lam, u, *options, ctx.saved_state = inputs
    y, state = output
    ctx.save_for_backward(x, weight, lam, u, y if u is None else state)  # without u, y is the state
    ctx.options = options
    ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    if not ctx.saved_state:
        raise RuntimeError("line_scan_forward was called with save_state=False, so it has no gradient")
    wanted = list(ctx.needs_input_grad[:4])
    grads = line_scan_backward(dy, *ctx.saved_tensors, *ctx.options, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *[None] * 4


line_scan_forward.register_autograd(_backward, setup_context=_setup_context)
