"""Which models can be converted, their self-attention layers, and why others cannot."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import nn

from gspn2_diffusion.conversion.self_attention import GSPN2SelfAttention

FAMILIES = (
    "UNet2DConditionModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "DiTTransformer2DModel",
)
Layers = str | Sequence[str]


def check_family(model: Any) -> str:
    """Name of the family in :data:`FAMILIES` that ``model`` belongs to.

    Raises:
        TypeError: no torch module.
        ValueError: a model whose self-attention cannot be replaced; says which layer and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a diffusers model or pipeline, a folder or a Hub id, got {type(model).__name__}."
        )
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("diffusers."):
            return cls.__name__
    raise ValueError(
        f"model must be one of {', '.join(FAMILIES)}, got {type(model).__name__}: {_why_not(model)}."
    )


def _why_not(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if getattr(module, "add_k_proj", None) is not None:
            return (
                f"layer {name!r} ({type(module).__name__}) is a joint attention, in which picture and text "
                "tokens attend to each other; without it no text would reach the picture"
            )
    for name, module in model.named_modules():
        if isinstance(module, Attention) or type(module).__name__.endswith("Attention"):
            return (
                f"layer {name!r} ({type(module).__name__}) belongs to a block that is not known to pass on "
                "the height and width of its tokens"
            )
    return "it has no attention layers"


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every ``attn1`` of the model by its module name, in order, converted ones included."""
    return {
        f"{name}.attn1": module.attn1
        for name, module in model.named_modules()
        if isinstance(module, (BasicTransformerBlock, SanaTransformerBlock))
    }


def check_replaceable(name: str, attention: nn.Module) -> None:
    """Raises ``ValueError`` with the layer and the reason if it is no plain self-attention."""
    reason = ""
    if not isinstance(attention, Attention):
        reason = f"it is a {type(attention).__name__}, not diffusers' Attention"
    elif attention.is_cross_attention:
        reason = "it attends to the text, not to the picture"
    elif attention.added_kv_proj_dim is not None:
        reason = "it is a joint attention: without it no text would reach the picture"
    elif attention.residual_connection or attention.group_norm is not None:
        reason = "it normalises or adds its own input"
    elif any(type(layer) is not nn.Linear for layer in (attention.to_v, attention.to_out[0])):  # type: ignore
        reason = f"its projections are {type(attention.to_v).__name__}, no plain linear layers"
    elif attention.to_v.weight.is_meta:
        reason = "its weights are offloaded: convert before offloading"
    if reason:
        raise ValueError(
            f"layer {name!r} cannot be replaced: {reason}. Name it in keep_attention to leave it as it is."
        )


def select_layers(names: Sequence[str], wanted: Layers, argument: str) -> list[str]:
    """Those of ``names`` that ``wanted`` says: "all", a name or pattern (``*``, ``?``), or a list of them.

    A pattern is matched against the whole module name with and without the ending ``.attn1``.

    Raises:
        TypeError: not a string or a list of strings.
        ValueError: an entry that matches nothing.
    """
    patterns = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(item, str) for item in patterns):
        raise TypeError(f"{argument} must be 'all', a pattern or a list of names, got {wanted!r}.")
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if pattern == "all" or _matches(name, pattern)}
        if not found:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{argument}: {pattern!r} matches no self-attention layer; there are {shown}.")
        chosen |= found
    return [name for name in names if name in chosen]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".attn1"), pattern)


def select_kept(names: Sequence[str], keep: Layers | int | None) -> list[str]:
    """Layers that stay attention: none, a number of them spread evenly, or as :func:`select_layers`.

    Raises:
        TypeError, ValueError: as :func:`select_layers`, or a number out of range.
    """
    if keep is None or (not isinstance(keep, (str, int)) and len(keep) == 0):
        return []
    if not isinstance(keep, int):
        return select_layers(names, keep, "keep_attention")
    if not 0 <= keep < len(names):
        raise ValueError(f"keep_attention must be from 0 to {len(names) - 1} layers, got {keep}.")
    return [names[(2 * index + 1) * len(names) // (2 * keep)] for index in range(keep)]


def native_grid(model: Any, name: str) -> tuple[int, int]:
    """Token grid ``(height, width)`` of a layer when the model draws at its own size."""
    size = model.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if check_family(model) == "UNet2DConditionModel":
        depth = len(model.config.down_block_types) - 1
        place = name.split(".")
        level = (
            {"down_blocks": int(place[1]), "up_blocks": depth - int(place[1])}.get(place[0], depth)
            if place[1].isdecimal()
            else depth
        )
        return max(1, height >> level), max(1, width >> level)
    patch = model.config.patch_size or 1
    return max(1, height // patch), max(1, width // patch)


def converted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that have been converted."""
    return [name for name, layer in attention_layers(model).items() if isinstance(layer, GSPN2SelfAttention)]
