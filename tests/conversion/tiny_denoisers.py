"""Tiny denoisers of other families, with the arguments of a call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel
from tiny_models import randomized

TEXT = 16


def tiny_unet(xl: bool = False) -> UNet2DConditionModel:
    """An SD-1.5 UNet in small (1x1 convolutions around the blocks), or an SDXL one (linear layers)."""
    more: dict[str, Any] = (
        {
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + TEXT,
        }
        if xl
        else {}
    )
    model = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=(2, 4) if xl else 8,
        norm_num_groups=8,
        **more,
    )
    return randomized(model, seed=5, std=0.15)


def tiny_pixart() -> PixArtTransformer2DModel:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=TEXT,
        interpolation_scale=1,
    )
    return randomized(model, seed=6, std=0.15)


def tiny_sana() -> SanaTransformer2DModel:
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT,
        sample_size=8,
    )
    return randomized(model, seed=7, std=0.15)


def tiny_unet_xl() -> UNet2DConditionModel:
    return tiny_unet(xl=True)


BUILDERS = {
    "sd15": tiny_unet,
    "sdxl": tiny_unet_xl,
    "pixart": tiny_pixart,
    "sana": tiny_sana,
}


def arguments(family: str, height: int = 8, width: int = 16, seed: int = 0) -> dict[str, Any]:
    """A call for one picture of ``height x width`` latents, half of whose energy is a smooth gradient."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(-1, 1, width).expand(1, 4, height, width)
    found: dict[str, Any] = {
        "encoder_hidden_states": torch.randn(1, 5, TEXT, generator=generator),
        "timestep": torch.tensor([500]),
    }
    latents = torch.randn(1, 4, height, width, generator=generator) + ramp
    if family == "sdxl":
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, TEXT, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
        }
    elif family == "pixart":
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return {("sample" if family.startswith("sd") else "hidden_states"): latents, **found}


@torch.no_grad()
def output(family: str, model: Any, **options: Any) -> torch.Tensor:
    return model(**arguments(family, **options)).sample
