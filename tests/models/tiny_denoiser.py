"""A denoiser small enough for tests."""

from __future__ import annotations

import torch

from gspn2_diffusion import GSPN2Transformer2DModel

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_inner_dim": 8,
    "caption_channels": 12,
    "pooled_projection_dim": 6,
    "mlp_ratio": 2.0,
    "proxy_dim": 4,
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Replace the zero start of adaLN-zero by small random numbers, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def make_model(**options) -> GSPN2Transformer2DModel:
    torch.manual_seed(0)
    model = GSPN2Transformer2DModel(**{**CONFIG, **options}).eval()
    randomize(model)
    return model


def make_inputs(height: int = 6, width: int = 10, batch: int = 2, pooled: bool = True) -> dict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": normal(batch, 3, height, width),
        "timestep": torch.linspace(100.0, 900.0, batch),
        "encoder_hidden_states": normal(batch, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]] * batch),
        "pooled_projections": normal(batch, 6) if pooled else None,
    }
