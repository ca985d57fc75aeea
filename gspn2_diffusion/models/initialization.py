"""How a fresh denoiser starts, in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.models.caption_refiner import start_as_identity


@torch.no_grad()
def initialize_weights(model: Any) -> None:
    """Random everywhere, as diffusers builds its models: a fresh denoiser already answers to every input.

    Linear layers are Xavier-uniform with zero bias, the timestep's are normal(0, 0.02), the modulation's
    tables normal(0, 1/C) (PixArt-alpha, arXiv 2310.00426); convolutions stay as torch makes them. The mixers
    then set their own start (see :class:`GSPN2Mixer`).

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
    for table in (model.scale_shift_table, *(block.scale_shift_table for block in model.transformer_blocks)):
        nn.init.normal_(table, std=table.shape[-1] ** -0.5)


@torch.no_grad()
def initialize_for_training(model: Any) -> None:
    """adaLN-zero (DiT, arXiv 2212.09748): every residual and the output start at exactly zero.

    Zero are the modulation (projection and tables, hence all gates), the output projections of the
    cross-attention and the caption layers, the local perception units and the final projection; the rest is
    left as it is. Call it on a fresh model before training it from scratch.

    Args:
        model: a ``GSPN2Transformer2DModel``; meta tensors are fine.
    """
    for module in (model.time_embed.linear, model.proj_out):
        _zero(module)
    nn.init.zeros_(model.scale_shift_table)
    for layer in model.caption_layers:
        start_as_identity(layer)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
        _zero(block.cross_attn.to_out[0])
        if block.local_perception is not None:
            _zero(block.local_perception.conv)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
