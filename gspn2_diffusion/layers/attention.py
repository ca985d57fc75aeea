"""Attention mixers and the cross-attention to text, on diffusers' ``Attention`` and its parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from gspn2_diffusion.layers.mixer import check_grid

ROTARY_BASE = 10000.0


def axial_rotary_angles(height: int, width: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Rotation angles for a picture's tokens, computed in the graph so that any size compiles.

    The first half of the angles turns with the row, the second with the column (RoPE, arXiv 2104.09864,
    once per axis).

    Returns:
        float32 ``(height*width, head_dim // 2)``, radians, row-major like the tokens.
    """
    quarter = head_dim // 4
    exponent = torch.arange(quarter, dtype=torch.float32, device=device) / quarter
    frequency = ROTARY_BASE**-exponent
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * frequency
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequency
    grid = (rows[:, None].expand(height, width, quarter), columns[None].expand(height, width, quarter))
    return torch.cat(grid, dim=-1).flatten(0, 1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn channel pairs ``(i, i + d/2)`` of ``x (B, heads, N, d)`` by ``angles (N, d/2)``, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _project(attn: Attention, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised query and key, and value, each ``(B, heads, N, head_dim)``."""
    query, key, value = (
        linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    return attn.norm_q(query), attn.norm_k(key), value  # type: ignore[misc]


def _merge(attn: Attention, hidden_states: torch.Tensor) -> torch.Tensor:
    """``(B, heads, N, head_dim)`` -> ``(B, N, dim)`` through the output projection."""
    hidden_states = hidden_states.transpose(1, 2).flatten(2)
    return attn.to_out[1](attn.to_out[0](hidden_states))


class RotaryAttnProcessor:
    """Softmax self-attention over a picture's tokens with axial rotary embedding."""

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        query, key, value = _project(attn, hidden_states)
        angles = axial_rotary_angles(height, width, query.shape[-1], query.device)
        query, key = rotate(query, angles).to(value.dtype), rotate(key, angles).to(value.dtype)
        return _merge(attn, F.scaled_dot_product_attention(query, key, value))


class ReLULinearAttnProcessor:
    """ReLU linear attention (as in Sana, arXiv 2410.10629): key-value sums accumulate in float32."""

    eps = 1e-6

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        query, key, value = _project(attn, hidden_states)
        # Autocast would put these products back to half precision, too coarse for sums over many tokens.
        with torch.autocast(device_type=query.device.type, enabled=False):
            q, k, v = F.relu(query).float(), F.relu(key).float(), value.float()
            numerator = q @ (k.transpose(-1, -2) @ v)
            denominator = q @ k.sum(dim=2).unsqueeze(-1)
            mixed = numerator / (denominator + self.eps)
        return _merge(attn, mixed.to(value.dtype))


class AttentionMixer(Attention):
    """Self-attention with the mixer's call: tokens, height and width in, tokens out.

    Args:
        dim: channels of the tokens.
        heads: number of heads; must divide ``dim``, and leave a multiple of 4 channels each for "softmax".
        kind: "softmax" (scaled dot product, axial rotary embedding) or "linear" (ReLU linear attention;
            like Sana's it has no positional embedding and relies on the convolution beside it).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, dim: int, heads: int, kind: str = "softmax") -> None:
        if kind not in ("softmax", "linear"):
            raise ValueError(f"kind must be 'softmax' or 'linear', got {kind!r}.")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads} for dim={dim}.")
        head_dim = dim // heads
        if kind == "softmax" and head_dim % 4:
            raise ValueError(f"softmax attention needs a multiple of 4 channels per head, got {head_dim}.")
        processor: Any = RotaryAttnProcessor() if kind == "softmax" else ReLULinearAttnProcessor()
        super().__init__(
            dim, heads=heads, dim_head=head_dim, bias=True, qk_norm="rms_norm", eps=1e-6, processor=processor
        )

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:  # type: ignore[override]
        """Mix ``hidden_states (B, height*width, dim)``; returns the same shape.

        Raises:
            ValueError: ``hidden_states`` has another shape than ``height``, ``width`` and ``dim`` say.
        """
        check_grid(hidden_states, self.query_dim, height, width)
        return self.processor(self, hidden_states, height=height, width=width)


def make_cross_attention(dim: int, inner_dim: int, heads: int) -> nn.Module:
    """diffusers' ``Attention`` from picture tokens to text tokens: ``dim`` wide, ``inner_dim`` inside.

    Called as ``attn(hidden_states, encoder_hidden_states=..., attention_mask=...)`` with the mask an
    additive bias ``(B, 1, L)`` or ``(B * heads, 1, L)``. Queries and keys are RMS-normalised per head.

    Raises:
        ValueError: ``heads`` does not divide ``inner_dim``.
    """
    if heads < 1 or inner_dim % heads:
        raise ValueError(
            f"num_cross_attention_heads must divide cross_attention_inner_dim, got {heads} for {inner_dim}."
        )
    return Attention(
        dim,
        cross_attention_dim=dim,
        heads=heads,
        dim_head=inner_dim // heads,
        bias=True,
        qk_norm="rms_norm",
        eps=1e-6,
    )
