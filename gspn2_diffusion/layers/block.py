"""One block of the denoiser, and the choice of its mixer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gspn2_diffusion.layers.attention import AttentionMixer, make_cross_attention
from gspn2_diffusion.layers.feed_forward import LocalPerceptionUnit, is_plain, make_feed_forward
from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.ops.ada_layer_norm import ada_layer_norm
from gspn2_diffusion.ops.line_scan import DIRECTIONS

MIXERS = ("gspn2", "softmax", "linear", "none")


def norm_and_modulate(
    norm: nn.Module, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, backend: str
) -> torch.Tensor:
    """``modulate(norm(x), shift, scale)``, in one pass where the norm is nothing but torch's."""
    if backend != "reference" and isinstance(norm, nn.LayerNorm) and is_plain(norm) and norm.weight is None:
        return ada_layer_norm(x, shift, scale, norm.eps, backend=backend)
    return modulate(norm(x), shift, scale)


def modulate(normed: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``normed (B, N, C)`` shifted and scaled by ``(B, 1, C)``, in the dtype of ``normed``."""
    return torch.addcmul(shift, normed, 1 + scale).to(normed.dtype)


def make_mixer(
    name: str,
    dim: int,
    num_attention_heads: int,
    proxy_dim: int | None,
    num_weight_groups: int,
    chunk_size: int | None,
    scan_directions: Sequence[str] | None = None,
) -> nn.Module | None:
    """The mixer called ``name`` (one of :data:`MIXERS`), or None for "none".

    Raises:
        ValueError: an unknown name, or an argument that the mixer rejects.
    """
    if name == "none":
        return None
    if name == "gspn2":
        directions = DIRECTIONS if scan_directions is None else scan_directions
        return GSPN2Mixer(dim, proxy_dim, num_weight_groups, chunk_size, directions)
    if name in ("softmax", "linear"):
        return AttentionMixer(dim, num_attention_heads, name)
    raise ValueError(f"mixer must be one of {MIXERS}, got {name!r}.")


class GSPN2TransformerBlock(nn.Module):
    """Mixer, cross-attention to text, local perception unit and SwiGLU feed-forward, each a residual.

    The mixer and the feed-forward are modulated and gated by adaLN-single; the cross-attention and the
    local perception unit are not. Every LayerNorm is without parameters. A block whose mixer is "none"
    skips the mixer's residual altogether.

    Args:
        dim: channels C of the tokens.
        num_attention_heads: heads of a "softmax" or "linear" mixer.
        num_cross_attention_heads: heads of the cross-attention.
        cross_attention_inner_dim: width inside the cross-attention.
        mlp_ratio: hidden width of the feed-forward over ``dim`` (rounded to a multiple of 32).
        mixer: one of :data:`MIXERS`.
        proxy_dim, num_weight_groups, chunk_size, scan_directions: see :class:`GSPN2Mixer`.
        local_perception: include the local perception unit.
        norm_eps: epsilon of the LayerNorms.

    Attributes:
        norm_backend: of the modulated norms, "auto", "cupy" or "reference".
    """

    norm_backend: str = "auto"

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        num_cross_attention_heads: int,
        cross_attention_inner_dim: int,
        mlp_ratio: float,
        mixer: str = "gspn2",
        proxy_dim: int | None = None,
        num_weight_groups: int = 1,
        chunk_size: int | None = None,
        local_perception: bool = True,
        norm_eps: float = 1e-6,
        scan_directions: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.mixer = make_mixer(
            mixer, dim, num_attention_heads, proxy_dim, num_weight_groups, chunk_size, scan_directions
        )
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.cross_attn = make_cross_attention(dim, cross_attention_inner_dim, num_cross_attention_heads)
        self.local_perception = LocalPerceptionUnit(dim) if local_perception else None
        self.norm3 = nn.LayerNorm(dim, eps=norm_eps, elementwise_affine=False)
        self.ff = make_feed_forward(dim, mlp_ratio)
        # shift, scale, gate of the mixer (absent without one), then of the feed-forward
        self.scale_shift_table = nn.Parameter(torch.zeros(3 if self.mixer is None else 6, dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        temb: torch.Tensor,
        height: int,
        width: int,
    ) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: ``(B, height*width, C)``.
            encoder_hidden_states: text tokens ``(B, L, C)``.
            encoder_attention_mask: additive bias ``(B, 1, L)`` or ``(B * heads, 1, L)`` or None.
            temb: the model's shared modulation, ``(B, 6*C)``.
            height, width: the token grid.

        Returns:
            ``(B, height*width, C)``.
        """
        table = self.scale_shift_table
        modulation = temb.unflatten(-1, (6, -1))[:, -table.shape[0] :] + table  # (B, 6 or 3, C)
        parts = modulation.unsqueeze(2).unbind(1)  # each (B, 1, C)
        if self.mixer is not None:
            shift, scale, gate = parts[:3]
            normed = norm_and_modulate(self.norm1, hidden_states, shift, scale, self.norm_backend)
            hidden_states = torch.addcmul(hidden_states, gate, self.mixer(normed, height, width))
        hidden_states = hidden_states + self.cross_attn(
            self.norm2(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
        )
        if self.local_perception is not None:
            hidden_states = self.local_perception(hidden_states, height, width)
        shift, scale, gate = parts[-3:]
        normed = norm_and_modulate(self.norm3, hidden_states, shift, scale, self.norm_backend)
        return torch.addcmul(hidden_states, gate, self.ff(normed))
