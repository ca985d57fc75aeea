"""What stands beside the mixer in a block: local perception unit and gated feed-forward."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from gspn2_diffusion.layers.mixer import check_scan_backend
from gspn2_diffusion.ops.local_perception import local_perception

_HIDDEN_MULTIPLE = 32


class LocalPerceptionUnit(nn.Module):
    """``x + depthwise_3x3(x)`` on the picture grid (CMT, arXiv 2107.06263; used by the GSPN papers).

    See :func:`~gspn2_diffusion.ops.local_perception.local_perception`; nothing is transposed in memory. A
    ``conv`` that is more than its weights (an adapter, hooks of offloading) is called as a module.

    Args:
        dim: channels of the tokens.
        backend: "auto", "cupy" or "reference", see :func:`~gspn2_diffusion.line_scan`. May be set later.
    """

    def __init__(self, dim: int, backend: str = "auto") -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.backend = check_scan_backend(backend)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """``hidden_states (B, height*width, dim)`` -> the same shape."""
        picture = hidden_states.unflatten(1, (height, width))  # (B, H, W, C)
        conv = self.conv
        if is_plain(conv):
            assert conv.bias is not None
            return local_perception(picture, conv.weight, conv.bias, backend=self.backend).flatten(1, 2)
        local = conv(picture.permute(0, 3, 1, 2))  # channels last
        return hidden_states + local.permute(0, 2, 3, 1).flatten(1, 2)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer of torch's own does no more than its weights say: no adapter, no hooks."""
    return (
        type(layer) in (nn.Linear, nn.Conv2d, nn.LayerNorm)
        and "forward" not in layer.__dict__
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def feed_forward_width(dim: int, mlp_ratio: float) -> int:
    """Hidden width of the feed-forward: the multiple of 32 (at least 32) nearest to ``dim * mlp_ratio``."""
    return max(1, round(dim * mlp_ratio / _HIDDEN_MULTIPLE)) * _HIDDEN_MULTIPLE


def make_feed_forward(dim: int, mlp_ratio: float) -> FeedForward:
    """SwiGLU feed-forward (arXiv 2002.05202), ``(B, N, dim)`` -> ``(B, N, dim)``."""
    return FeedForward(dim, inner_dim=feed_forward_width(dim, mlp_ratio), activation_fn="swiglu")
