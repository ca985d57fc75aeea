"""What a configuration and a call of the denoiser must fulfil; every message names the argument."""

from __future__ import annotations

from typing import Any

import torch

from gspn2_diffusion.layers.block import MIXERS

_POSITIVE = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "caption_channels",
    "mlp_ratio",
    "num_weight_groups",
    "norm_eps",
)
_POSITIVE_OR_NONE = (
    "out_channels",
    "num_cross_attention_heads",
    "cross_attention_inner_dim",
    "pooled_projection_dim",
    "proxy_dim",
    "chunk_size",
)
_REAL = ("mlp_ratio", "norm_eps")


def mixer_per_layer(mixer: str | list[str], num_layers: int) -> list[str]:
    """One mixer name per layer.

    Raises:
        ValueError: an unknown name, or a list of another length than ``num_layers``.
    """
    names = [mixer] * num_layers if isinstance(mixer, str) else list(mixer)
    for name in names:
        if name not in MIXERS:
            raise ValueError(f"mixer must be one of {MIXERS} or a list of them, got {name!r}.")
    if len(names) != num_layers:
        raise ValueError(
            f"mixer as a list must have one name per layer, got {len(names)} for num_layers={num_layers}."
        )
    return names


def check_config(config: dict[str, Any]) -> None:
    """Raise ValueError, naming the value, unless ``config`` describes a model that can be built."""
    for name in _POSITIVE + _POSITIVE_OR_NONE:
        _check_positive(name, config[name], optional=name in _POSITIVE_OR_NONE)
    count = config["num_caption_layers"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"num_caption_layers must be an integer of at least 0, got {count!r}.")
    names = mixer_per_layer(config["mixer"], config["num_layers"])
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    if "softmax" in names and config["attention_head_dim"] % 4:
        raise ValueError(
            f"attention_head_dim must be a multiple of 4 for a softmax mixer, "
            f"got {config['attention_head_dim']}."
        )
    proxy_dim = config["proxy_dim"] or max(1, dim // 8)
    if "gspn2" in names and proxy_dim % config["num_weight_groups"]:
        raise ValueError(
            f"num_weight_groups must divide proxy_dim, got num_weight_groups={config['num_weight_groups']} "
            f"for proxy_dim={proxy_dim}."
        )
    inner = config["cross_attention_inner_dim"] or dim
    heads = config["num_cross_attention_heads"] or config["num_attention_heads"]
    if inner % heads:
        raise ValueError(
            f"num_cross_attention_heads must divide cross_attention_inner_dim, got {heads} for {inner}."
        )


def _check_positive(name: str, value: Any, optional: bool) -> None:
    if value is None and optional:
        return
    allowed = (int, float) if name in _REAL else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
        kind = "number" if name in _REAL else "integer"
        raise ValueError(f"{name} must be a positive {kind}{' or None' if optional else ''}, got {value!r}.")


def check_inputs(
    config: Any,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None,
    pooled_projections: torch.Tensor | None,
) -> None:
    """Raise ValueError, naming the tensor, unless the arguments of a call fit ``config`` and each other."""
    if hidden_states.ndim != 4 or hidden_states.shape[1] != config.in_channels:
        raise ValueError(
            f"hidden_states must be (B, {config.in_channels}, H, W), got {tuple(hidden_states.shape)}."
        )
    batch, _, height, width = hidden_states.shape
    if height < 1 or width < 1 or height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"hidden_states must have a height and width that patch_size={config.patch_size} divides, "
            f"got {height} x {width}."
        )
    if not isinstance(timestep, torch.Tensor):
        raise TypeError(f"timestep must be a tensor, got {type(timestep).__name__}.")
    if timestep.numel() != batch and timestep.numel() != 1:
        raise ValueError(f"timestep must be a single value or ({batch},), got shape {tuple(timestep.shape)}.")
    text = encoder_hidden_states.shape
    if len(text) != 3 or text[0] != batch or text[2] != config.caption_channels:
        raise ValueError(
            f"encoder_hidden_states must be ({batch}, L, {config.caption_channels}), got {tuple(text)}."
        )
    mask = encoder_attention_mask
    if mask is not None and mask.shape != text[:2]:
        raise ValueError(
            f"encoder_attention_mask must be {tuple(text[:2])} like encoder_hidden_states, "
            f"got {tuple(mask.shape)}."
        )
    _check_pooled(config.pooled_projection_dim, batch, pooled_projections)


def _check_pooled(pooled_dim: int | None, batch: int, pooled_projections: torch.Tensor | None) -> None:
    if pooled_dim is None:
        if pooled_projections is not None:
            raise ValueError(
                "pooled_projections must be None: this model's configuration has pooled_projection_dim=None."
            )
        return
    if pooled_projections is None:
        raise ValueError(
            f"pooled_projections is required: this model has pooled_projection_dim={pooled_dim}."
        )
    if pooled_projections.shape != (batch, pooled_dim):
        raise ValueError(
            f"pooled_projections must be ({batch}, {pooled_dim}), got {tuple(pooled_projections.shape)}."
        )
