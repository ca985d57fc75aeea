"""Inputs and ground truth shared by the tests of the modulated layer norm."""

from __future__ import annotations

import torch
from torch import Tensor

from gspn2_diffusion.ops.ada_layer_norm import ada_layer_norm_reference

NAMES = ("x", "shift", "scale")


def make_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    modulation: torch.dtype | None = None,
    shared: bool = False,
    device: str = "cpu",
) -> list[Tensor]:
    """Random leaf tensors ``x, shift, scale`` and a gradient of the result; ``shared`` by all pictures."""
    generator = torch.Generator().manual_seed(0)
    batch, _, channels = shape
    other = (1 if shared else batch, 1, channels)
    leaves = [
        (torch.randn(size, generator=generator) * 2 + 0.5).to(device, kind).requires_grad_()
        for size, kind in ((shape, dtype), (other, modulation or dtype), (other, modulation or dtype))
    ]
    return [*leaves, torch.randn(shape, generator=generator).to(device, dtype)]


def ground_truth(x: Tensor, shift: Tensor, scale: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The result and every gradient in float64, of the same rounded inputs."""
    exact = [t.detach().double().requires_grad_() for t in (x, shift, scale)]
    y = ada_layer_norm_reference(*exact, 1e-6)
    return {"y": y.detach(), **dict(zip(NAMES, torch.autograd.grad(y, exact, dy.double()), strict=True))}
