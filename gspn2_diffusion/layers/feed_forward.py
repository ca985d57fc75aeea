"""What stands beside the mixer in a block: local perception unit and gated feed-forward."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import nn

_HIDDEN_MULTIPLE = 32


class LocalPerceptionUnit(nn.Module):
    """``x + depthwise_3x3(x)`` on the picture grid (CMT, arXiv 2107.06263; used by the GSPN papers).

    The convolution sees the tokens as a channels-last ``(B, C, H, W)`` view: nothing is transposed in
    memory.

    Args:
        dim: channels of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """``hidden_states (B, height*width, dim)`` -> the same shape."""
        picture = hidden_states.unflatten(1, (height, width)).permute(
            0, 3, 1, 2
        )  # (B, C, H, W), channels last
        local = self.conv(picture).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H*W, C)
        return hidden_states + local


def feed_forward_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of the feed-forward: the multiple of 32 (at least 32) nearest to ``dim * mlp_ratio``."""
    return max(1, round(dim * mlp_ratio / _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


def make_feed_forward(dim: int, mlp_ratio: float) -> FeedForward:
    """SwiGLU feed-forward (arXiv 2002.05202), ``(B, N, dim)`` -> ``(B, N, dim)``."""
    return FeedForward(dim, inner_dim=feed_forward_width(dim, mlp_ratio), activation_fn="swiglu")
