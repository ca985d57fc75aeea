"""Self-attention among the text tokens, before the picture reads them."""

from __future__ import annotations

import torch
from torch import nn

from gspn2_diffusion.layers.attention import make_cross_attention
from gspn2_diffusion.layers.feed_forward import make_feed_forward

_MLP_RATIO = 2.0


class CaptionLayer(nn.Module):
    """Self-attention and SwiGLU feed-forward of the text tokens, each a residual.

    A sentence encoder need not say in the token of a thing where the thing shall stand ("a cat to the left
    of a dog"): it says which words came in which order. These layers put that together, once per call and on
    a few dozen tokens, where picture tokens would need several blocks for it.

    Args:
        dim: channels C of the tokens.
        inner_dim: width inside the attention.
        heads: of the attention.
        norm_eps: epsilon of the LayerNorms.

    Raises:
        ValueError: ``heads`` does not divide ``inner_dim``.
    """

    def __init__(self, dim: int, inner_dim: int, heads: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = make_cross_attention(dim, inner_dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.ff = make_feed_forward(dim, _MLP_RATIO)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``tokens (B, L, C)`` -> the same shape; ``bias (B*heads, 1, L)`` is added to the logits."""
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, encoder_hidden_states=normed, attention_mask=bias)
        return tokens + self.ff(self.norm2(tokens))


@torch.no_grad()
def start_as_identity(layer: CaptionLayer) -> None:
    """Both residuals start at zero, and get gradients from the first step on."""
    for linear in (layer.attn.to_out[0], layer.ff.net[-1]):  # type: ignore[index,union-attr]
        for parameter in linear.parameters():  # type: ignore[union-attr]
            nn.init.zeros_(parameter)
