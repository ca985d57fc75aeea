"""How a fresh denoiser starts, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer


@torch.no_grad()
def initialize_weights(model: Any) -> None:
    """adaLN-zero (DiT, arXiv 2212.09748): every residual and the output start at exactly zero.

    Linear layers are Xavier-uniform with zero bias; the timestep's are normal(0, 0.02). The mixers then
    set their own start (see :class:`GSPN2Mixer`). Zero are the modulation (projection and tables, hence
    all gates), the output projections of the cross-attention, the local perception units and the final
    projection.

    Args:
        model: a ``GSPN2Transformer2DModel``; meta tensors are fine.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, GSPN2Mixer):
            module.reset_parameters()
    embedder = model.time_embed.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    for module in (model.time_embed.linear, model.proj_out):
        _zero(module)
    nn.init.zeros_(model.scale_shift_table)
    for block in model.transformer_blocks:
        _zero_residuals(block)


def _zero_residuals(block: Any) -> None:
    nn.init.zeros_(block.scale_shift_table)
    _zero(block.cross_attn.to_out[0])
    if block.local_perception is not None:
        _zero(block.local_perception.conv)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
