"""Which of diffusers' feature caches apply to the denoiser, and how they reach its scan mixers.

diffusers looks for its own attention classes, which a scan mixer is none of; a cache that finds nothing
does nothing, silently. Here the mixers are hooked as self-attention is, and a cache without any effect is
an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from gspn2_diffusion.layers.attention import AttentionMixer
from gspn2_diffusion.layers.block import GSPN2TransformerBlock
from gspn2_diffusion.layers.mixer import GSPN2Mixer

APPLICABLE = (
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "TaylorSeerCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "FasterCacheConfig",
)
_NOT_APPLICABLE = {
    "SeaCacheConfig": "it measures the frames of a video",
    "TextKVCacheConfig": "it knows the blocks of one other model (Nucleus-Image) only",
}
_WHOLE_BLOCKS = ("FirstBlockCacheConfig", "MagCacheConfig")
# Caches that keep one state per layer, whatever the call: its batch must stay as it is between steps.
ONE_STATE = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")
_TAYLOR_SEER_NAMES = [r"transformer_blocks\.\d+\.mixer", r"transformer_blocks\.\d+\.cross_attn"]


def register_block() -> None:
    """Tells diffusers what the block takes and returns.

    Not done on import: the registry imports a dozen of diffusers' models.
    """
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    TransformerBlockRegistry.register(
        GSPN2TransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0)
    )


def fit_config(model: Any, config: Any) -> Any:
    """``config`` as it is to be applied to ``model``, a ``GSPN2Transformer2DModel``.

    Raises:
        ValueError: the cache cannot apply to this model, with the reason.
    """
    name = type(config).__name__
    if name in _NOT_APPLICABLE:
        raise ValueError(
            f"the cache {name} cannot apply to {type(model).__name__}: {_NOT_APPLICABLE[name]}; "
            f"allowed are {', '.join(APPLICABLE)}"
        )
    if name in _WHOLE_BLOCKS and len(model.transformer_blocks) < 2:
        raise ValueError(f"the cache {name} skips all blocks but the first; this model has only one")
    if name == "FasterCacheConfig":
        return _fit_faster_cache(model, config)
    by_default = name == "TaylorSeerCacheConfig" and not (
        config.use_lite_mode or config.cache_identifiers or config.skip_predict_identifiers
    )
    return dataclasses.replace(config, cache_identifiers=_TAYLOR_SEER_NAMES) if by_default else config


def _fit_faster_cache(model: Any, config: Any) -> Any:
    if config.tensor_format != "BCHW":
        raise ValueError(
            f"FasterCacheConfig.tensor_format must be 'BCHW' for {type(model).__name__}, whose latents are "
            f"(B, C, H, W), got {config.tensor_format!r}"
        )
    if config.current_timestep_callback is None:
        raise ValueError(
            "FasterCacheConfig.current_timestep_callback is needed, got None; "
            "pass `lambda: pipe.current_timestep`"
        )
    if model.config.pooled_projection_dim is None:
        return config
    # Inputs that hold both halves of guidance, of which the one without the prompt is left out at times.
    halves = (*config._unconditional_conditional_input_kwargs_identifiers, "pooled_projections")
    return dataclasses.replace(config, _unconditional_conditional_input_kwargs_identifiers=halves)


def hook_mixers(model: Any, config: Any) -> None:
    """Hooks the mixers that diffusers passed over, where ``config`` asks for self-attention."""
    for name, module in model.named_modules():
        if isinstance(module, GSPN2Mixer) and type(config).__name__ == "PyramidAttentionBroadcastConfig":
            from diffusers.hooks import pyramid_attention_broadcast

            pyramid_attention_broadcast._apply_pyramid_attention_broadcast_on_attention_class(
                name,
                module,  # type: ignore[arg-type]
                config,
            )
        if isinstance(module, (GSPN2Mixer, AttentionMixer)) and type(config).__name__ == "FasterCacheConfig":
            from diffusers.hooks import faster_cache

            # It looks for self-attention by the end of the name.
            faster_cache._apply_faster_cache_on_attention_class(f"{name}.attn", module, config)  # type: ignore[arg-type]


def count_hooks(model: nn.Module) -> int:
    """Hooks of diffusers below ``model``."""
    below = (module for module in model.modules() if module is not model)
    registries = (getattr(module, "_diffusers_hook", None) for module in below)
    return sum(len(registry.hooks) for registry in registries if registry is not None)
