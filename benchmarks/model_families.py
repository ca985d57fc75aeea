"""The denoisers that ``models.py`` compares: full-size configurations, random weights, three variants each.

Variants of a family are made out of one another in place, in this order, so that only one is in memory:
"attention" is the original, "gspn2" the same after ``convert_to_gspn2``, "none" the same with a
self-attention that returns zero, which is the limit that no mixer can beat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VARIANTS = ("attention", "gspn2", "none")

_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_SDXL = {
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
_OWN_PIXART = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "caption_channels": 4096,
    "mlp_ratio": 8 / 3,  # SwiGLU with the parameters of PixArt's GELU at ratio 4
    "sample_size": 128,
}
_OWN_SANA = {
    "num_layers": 20,
    "num_attention_heads": 20,
    "attention_head_dim": 112,
    "in_channels": 32,
    "patch_size": 1,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
}
# Changes that make a family small enough to try the program on a CPU.
_TINY: dict[str, dict[str, Any]] = {
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "caption_channels": 16,
    },
    "sana": {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (2, 2, 2),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 256 + 16,
    },
    "own-pixart": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": 16,
    },
    "own-sana": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_channels": 16},
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: of the model's class.
        scale: pixels per latent along a side.
        channels: of the latents.
        text: tokens and channels of the encoded prompt.
        sizes: pixels along a side to be measured.
        quick: those of a quick run.
        limits: what the comparison asks for: size to (most time over "none", least speed over "attention").
        peak_limits: size to the most bytes that "gspn2" may take.
    """

    name: str
    config: dict[str, Any]
    scale: int
    channels: int
    text: tuple[int, int]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    limits: dict[int, tuple[float, float]]
    peak_limits: dict[int, float] = field(default_factory=dict)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "pixart", _PIXART, 8, 4, (300, 4096), (1024, 2048, 4096), (1024, 2048, 4096),
            {1024: (1.12, 1.5), 2048: (1.12, 3.0), 4096: (1.12, 10.0)},
        ),
        Family(
            "sana", {}, 32, 32, (300, 2304), (1024, 2048, 4096, 8192), (1024, 2048, 4096),
            {1024: (1.10, 1.0), 2048: (1.10, 1.3), 4096: (1.10, 1.3), 8192: (1.10, 1.3)},
        ),
        Family(
            "sdxl", _SDXL, 8, 4, (77, 2048), (1024, 4096, 16384), (1024, 4096),
            {1024: (1.15, 1.0), 4096: (1.15, 1.0), 16384: (1.15, 18.0)},
            {16384: 48e9},
        ),
        Family("own-pixart", _OWN_PIXART, 8, 4, (300, 4096), (1024, 2048, 4096), (), {}),
        Family("own-sana", _OWN_SANA, 32, 32, (300, 2304), (1024, 2048, 4096, 8192), (), {}),
    )
}  # fmt: skip


def tiny(family: Family) -> Family:
    """The family small, at sizes of at most 16 x 16 tokens."""
    config = {**family.config, **_TINY[family.name]}
    text = (5, config.get("caption_channels", config.get("cross_attention_dim", 16)))
    sizes = tuple(family.scale * side for side in (8, 16))
    limits = dict.fromkeys(sizes, (1e9, 0.0))
    return Family(family.name, config, family.scale, family.channels, text, sizes, sizes, limits)


def build(family: Family, variant: str, device: str, dtype: torch.dtype) -> Any:
    """The first variant of a family, or any variant of our own model, which are built apart."""
    from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel

    from gspn2_diffusion import GSPN2Transformer2DModel

    mixer = {"attention": "linear" if family.name == "own-sana" else "softmax"}.get(variant, variant)
    classes: dict[str, Callable[..., Any]] = {
        "pixart": PixArtTransformer2DModel,
        "sana": SanaTransformer2DModel,
        "sdxl": UNet2DConditionModel,
    }
    make = classes.get(family.name)
    with torch.device(device):
        model = make(**family.config) if make else GSPN2Transformer2DModel(**family.config, mixer=mixer)
    model = model.to(dtype).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last) if family.name == "sdxl" else model


def is_converted(family: Family) -> bool:
    """Whether variants are made in place out of diffusers' model."""
    return not family.name.startswith("own-")


def change(model: Any, variant: str) -> None:
    """Turn a model of diffusers into the next variant, in place."""
    from gspn2_diffusion import convert_to_gspn2

    if variant == "gspn2":
        convert_to_gspn2(model, init="random")
    elif variant == "none":
        for module in model.modules():
            if hasattr(module, "attn1"):
                module.attn1 = NoMixing()


class NoMixing(nn.Module):
    """A self-attention that returns zero and costs nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states.new_zeros(1).expand_as(hidden_states)


def make_inputs(family: Family, pixels: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one denoiser call for one picture of ``pixels x pixels``."""
    side = pixels // family.scale

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    latents = normal(1, family.channels, side, side)
    found: dict[str, Any] = {
        "encoder_hidden_states": normal(1, *family.text),
        "timestep": torch.tensor([500], device=device),
        "return_dict": False,
    }
    if family.name == "sdxl":
        pooled = family.config["projection_class_embeddings_input_dim"] - 6 * 256
        found["added_cond_kwargs"] = {"text_embeds": normal(1, pooled), "time_ids": normal(1, 6)}
        return {"sample": latents.contiguous(memory_format=torch.channels_last), **found}
    if family.name == "pixart":
        found["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return {"hidden_states": latents, **found}


def fit_positions(model: Any, pixels: int, family: Family) -> None:
    """PixArt computes its positional embedding anew in every call at a size that it was not built for.

    That is no part of any mixer, and cannot be captured in a graph: compute it once.
    """
    if family.name != "pixart":
        return
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    embed, side = model.pos_embed, pixels // family.scale // model.config.patch_size
    positions: Any = get_2d_sincos_pos_embed(
        embed.pos_embed.shape[-1],
        side,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=embed.pos_embed.device,
        output_type="pt",
    )
    embed.height = embed.width = side
    embed.pos_embed = positions.to(embed.pos_embed)[None]
