"""Modulated layer norm as an operator: normalise, scale and shift in one pass over the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusion.ops import ada_layer_norm_kernels as kernels
from gspn2_diffusion.ops.line_scan import choose_backend


def ada_layer_norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """:func:`ada_layer_norm` in plain torch; the result has the dtype of torch's layer norm."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(normed.dtype)


def ada_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift``, the norm without parameters (adaLN; DiT, arXiv 2212.09748).

    The kernel reads ``x`` once and writes the result once, in float32 between. Under autocast to bfloat16
    float32 tokens come out as bfloat16, which is what the projections after it take.

    Args:
        x: ``(B, N, C)``.
        shift, scale: ``(B, 1, C)`` or ``(1, 1, C)``, of the dtype of ``x`` or float32.
        eps: added to the variance.
        backend: "auto", "cupy" or "reference", see :func:`~gspn2_diffusion.line_scan`. "auto" leaves to plain
            torch what the kernel does not take (channels that 4 does not divide or more than 5,120, other
            dtypes).

    Returns:
        ``(B, N, C)``. Differentiable once in all three.

    Raises:
        TypeError, ValueError, RuntimeError: ``backend="cupy"`` cannot run here; shapes that do not fit.
    """
    _check(x, shift, scale)
    if choose_backend(backend, x) == "reference":
        return ada_layer_norm_reference(x, shift, scale, eps)
    autocast = torch.is_autocast_enabled("cuda")
    out_dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    if not kernels.fits(x, shift, scale, out_dtype):
        if backend == "cupy":
            raise ValueError(
                f"backend='cupy' needs a multiple of {kernels.VECTORS[0]} channels, at most "
                f"{kernels.MOST_CHANNELS}, and a result of the dtype of x or bfloat16 of float32; got "
                f"{x.shape[-1]} channels, x {x.dtype}, shift {shift.dtype}, scale {scale.dtype}, "
                f"result {out_dtype}"
            )
        return ada_layer_norm_reference(x, shift, scale, eps)
    if torch.compiler.is_compiling():
        traced: Tensor = kernels.ada_layer_norm(x, shift, scale, eps, out_dtype)[0]
        return traced
    if torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or scale.requires_grad):
        return kernels.AdaLayerNorm.apply(x, shift, scale, eps, out_dtype)  # type: ignore[no-any-return,no-untyped-call]
    return kernels.normalise(x, shift, scale, eps, out_dtype, False)[0]


def _check(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"x must have shape (B, N, C), got {tuple(x.shape)}")
    batch, _, channels = x.shape
    for name, tensor in (("shift", shift), ("scale", scale)):
        if tensor.shape not in ((batch, 1, channels), (1, 1, channels)):
            raise ValueError(
                f"{name} must have shape (B, 1, C) = {(batch, 1, channels)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; use one device")
