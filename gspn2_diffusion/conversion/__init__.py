"""GSPN-2 inside other people's models: self-attention replaced by line scans.

Light to import, because ``import gspn2_diffusion`` imports it: diffusers looks the classes of a saved
pipeline up in modules that are already loaded, and finds ours here. Names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "convert_to_gspn2": "gspn2_diffusion.conversion.convert",
    "GSPN2SelfAttention": "gspn2_diffusion.conversion.self_attention",
    "GSPN2UNet2DConditionModel": "gspn2_diffusion.conversion.converted_models",
    "GSPN2PixArtTransformer2DModel": "gspn2_diffusion.conversion.converted_models",
    "GSPN2SanaTransformer2DModel": "gspn2_diffusion.conversion.converted_models",
    "GSPN2DiTTransformer2DModel": "gspn2_diffusion.conversion.converted_models",
    # Where diffusers finds a class it looks for that class's base as well.
    "ModelMixin": "diffusers.models.modeling_utils",
}

__all__ = [
    "GSPN2DiTTransformer2DModel",
    "GSPN2PixArtTransformer2DModel",
    "GSPN2SanaTransformer2DModel",
    "GSPN2SelfAttention",
    "GSPN2UNet2DConditionModel",
    "convert_to_gspn2",
]

if TYPE_CHECKING:
    from gspn2_diffusion.conversion.convert import convert_to_gspn2
    from gspn2_diffusion.conversion.converted_models import (
        GSPN2DiTTransformer2DModel,
        GSPN2PixArtTransformer2DModel,
        GSPN2SanaTransformer2DModel,
        GSPN2UNet2DConditionModel,
    )
    from gspn2_diffusion.conversion.self_attention import GSPN2SelfAttention


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
