"""Conditioning vectors for adaLN-single."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import PixArtAlphaTextProjection, TimestepEmbedding, Timesteps
from torch import nn

NUM_FREQUENCIES = 256


class TimestepTextEmbedding(nn.Module):
    """Timestep, and optionally a pooled text vector, to the shared modulation of all blocks.

    adaLN-single (PixArt-alpha, arXiv 2310.00426, section 2.3): the six modulation vectors are projected
    once for the whole model; each block adds a table of its own.

    Args:
        dim: channels of the tokens.
        pooled_projection_dim: channels of the pooled text vector; None for a model that takes none.
    """

    def __init__(self, dim: int, pooled_projection_dim: int | None = None) -> None:
        super().__init__()
        self.time_proj = Timesteps(NUM_FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(NUM_FREQUENCIES, dim)
        self.text_embedder = (
            None
            if pooled_projection_dim is None
            else PixArtAlphaTextProjection(pooled_projection_dim, dim, act_fn="silu")
        )
        self.act = nn.SiLU()
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(
        self, timestep: torch.Tensor, pooled_projections: torch.Tensor | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``timestep (B,)`` and ``pooled_projections (B, P)`` to the modulation ``(B, 6*dim)`` and the
        embedding ``(B, dim)``. The sinusoids are float32; everything after them is in ``dtype``."""
        embedded = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        if self.text_embedder is not None:
            embedded = embedded + self.text_embedder(pooled_projections)
        return self.linear(self.act(embedded)), embedded
