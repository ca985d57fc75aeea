"""The local perception unit as an operator: a depthwise convolution and its residual in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusion.ops import local_perception_kernels as kernels
from gspn2_diffusion.ops.line_scan import choose_backend


def local_perception_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`local_perception` in plain torch; the convolution sees ``x`` as a channels-last view."""
    picture = x.permute(0, 3, 1, 2)
    local = F.conv2d(picture, weight, bias, padding=1, groups=x.shape[-1])
    return x + local.permute(0, 2, 3, 1)


def local_perception(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """``x + depthwise_3x3(x)`` on a picture, channels last (CMT, arXiv 2107.06263, section 3.2).

    The kernel reads ``x`` once and writes the result once; sums are in float32 and rounded once. cuDNN takes
    several times as long for a depthwise convolution of channels-last pictures.

    Args:
        x: ``(B, H, W, C)``, any layout whose last dimension has stride 1 is used in place.
        weight: ``(C, 1, 3, 3)`` of the dtype of ``x`` or float32, as under autocast, where ``x`` keeps its
            dtype.
        bias: ``(C,)`` of the dtype of ``weight``.
        backend: "auto", "cupy" or "reference", see :func:`~gspn2_diffusion.line_scan`.

    Returns:
        The shape and dtype of ``x``. Differentiable once in all three.

    Raises:
        TypeError: dtypes that do not fit together.
        ValueError: shapes that do not fit together, or ``backend="cupy"`` without CUDA tensors.
        RuntimeError: ``backend="cupy"`` cannot run here.
    """
    _check(x, weight, bias)
    if choose_backend(backend, x) == "reference":
        return local_perception_reference(x, weight, bias)
    if weight.dtype not in (x.dtype, torch.float32):
        weight, bias = weight.float(), bias.float()
    weight, bias = weight.contiguous(), bias.contiguous()
    if torch.compiler.is_compiling() or x.numel() == 0:
        traced: Tensor = kernels.local_perception(x, weight, bias)
        return traced
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return kernels.LocalPerception.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]
    return kernels.convolve(x, weight, bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, H, W, C), got {tuple(x.shape)}")
    channels = x.shape[-1]
    if weight.shape != (channels, 1, 3, 3):
        raise ValueError(
            f"weight must have shape (C, 1, 3, 3) = {(channels, 1, 3, 3)}, got {tuple(weight.shape)}"
        )
    if bias.shape != (channels,):
        raise ValueError(f"bias must have shape (C,) = {(channels,)}, got {tuple(bias.shape)}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias has dtype {bias.dtype}, but weight has {weight.dtype}; use one dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; use one device")
