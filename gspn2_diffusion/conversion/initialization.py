"""How a converted layer starts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer

logger = logging.getLogger(__name__)

INITS = ("attention", "random", "zero")


@torch.no_grad()
def initialize_mixer(
    mixer: GSPN2Mixer, init: str, attention: Attention, grid: tuple[int, int], name: str
) -> None:
    """Start ``mixer`` in the place of ``attention``.

    Args:
        init: "attention" takes over what the attention does with its values (see :func:`start_as_attention`);
            "random" is the mixer's own start; "zero" is the same with an output of zero, so that the model
            starts as it would be without this layer.
        grid: height and width in tokens at the model's own size.
        name: for the log.
    """
    if init == "attention" and not _values_fit(attention):
        logger.warning("%s: to_v and to_out do not fit each other; the layer starts at random", name)
        init = "random"
    if init == "attention":
        start_as_attention(mixer, attention, grid)
    elif init == "zero":
        nn.init.zeros_(mixer.to_out.weight)
        nn.init.zeros_(mixer.to_out.bias)


def _values_fit(attention: Attention) -> bool:
    value, out = attention.to_v, attention.to_out[0]  # type: ignore[index]
    return value.out_features == out.in_features and value.in_features == out.out_features


@torch.no_grad()
def start_as_attention(mixer: GSPN2Mixer, attention: Attention, grid: tuple[int, int]) -> None:
    """Make the mixer equal to its attention for a uniform picture, as far as its proxy channels allow.

    An attention's output is ``M`` times a weighted mean of its tokens plus a constant, where ``M`` is the
    product of its output and value projections. The mean is what a scan can do: with even weights and fixed
    gates, all four directions together sum over ``height + width + 2`` lines, so gates of one over the root
    of that number make them average. ``M`` is approximated by its best factors of rank ``proxy_dim`` (the
    directions of the tokens to which it reacts most): exact if ``proxy_dim`` reaches the width.
    """
    value: Any = attention.to_v
    out: Any = attention.to_out[0]  # type: ignore[index]
    weight = (out.weight.float() @ value.weight.float()) / attention.rescale_output_factor  # (C, C)
    bias = torch.zeros(weight.shape[0], device=weight.device) if out.bias is None else out.bias.float()
    if value.bias is not None:
        bias = bias + out.weight.float() @ value.bias.float()

    basis = _leading_inputs(weight, mixer.proxy_dim)  # (C, P), orthonormal columns
    mixer.to_proxy.weight.copy_(basis.T)
    mixer.to_out.weight.copy_((weight @ basis).repeat(1, len(mixer.directions)))
    mixer.to_out.bias.copy_(bias / attention.rescale_output_factor)
    nn.init.zeros_(mixer.to_proxy.bias)

    count = len(mixer.directions) * mixer.proxy_dim
    nn.init.zeros_(mixer.to_scan.weight)
    nn.init.zeros_(mixer.to_scan.bias)
    mixer.to_scan.bias[: 2 * count] = lines_summed(mixer, grid) ** -0.5


def lines_summed(mixer: GSPN2Mixer, grid: tuple[int, int]) -> float:
    """How many lines reach a position, summed over the mixer's directions (their mean over positions)."""
    lines = {"down": grid[0], "up": grid[0], "right": grid[1], "left": grid[1]}
    limit = mixer.chunk_size or max(grid)
    return sum((min(lines[direction], limit) + 1) / 2 for direction in mixer.directions)


def _leading_inputs(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` orthonormal input directions ``(C, count)`` that ``weight (C, C)`` amplifies most."""
    matrix = weight.cpu()  # eigenvectors are needed once; not every device computes them
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors  # eigenvalues ascend
    return vectors.flip(1)[:, :count].to(weight.device)
