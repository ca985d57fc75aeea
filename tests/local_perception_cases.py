"""Inputs and ground truth shared by the tests of the local perception operator."""

from __future__ import annotations

import torch
from torch import Tensor

from gspn2_diffusion.ops.local_perception import local_perception_reference

NAMES = ("x", "weight", "bias")


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    """Random leaf tensors ``x, weight, bias`` and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[-1]
    kinds = (
        (shape, dtype),
        ((channels, 1, 3, 3), weight_dtype or dtype),
        ((channels,), weight_dtype or dtype),
    )
    leaves = [
        torch.randn(size, generator=generator).to(device, kind).requires_grad_() for size, kind in kinds
    ]
    return [*leaves, torch.randn(shape, generator=generator).to(device, dtype)]


def ground_truth(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The result and every gradient in float64, of the same rounded inputs."""
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = local_perception_reference(*exact)
    return {"y": y.detach(), **dict(zip(NAMES, torch.autograd.grad(y, exact, dy.double()), strict=True))}


def spread(t: Tensor) -> Tensor:
    """The same values as a view of a wider tensor of NaN, rows and columns the other way round in memory."""
    batch, height, width, channels = t.shape
    wide = torch.full((batch, width + 1, height, channels + 8), float("nan"), dtype=t.dtype, device=t.device)
    view = wide.transpose(1, 2)[:, :, 1:, 4 : 4 + channels]
    view.copy_(t.detach())
    return view
