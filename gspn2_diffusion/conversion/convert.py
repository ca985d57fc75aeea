"""convert_to_gspn2: self-attention out, line scans in."""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from gspn2_diffusion.conversion import families
from gspn2_diffusion.conversion.families import Layers
from gspn2_diffusion.conversion.initialization import INITS, initialize_mixer
from gspn2_diffusion.conversion.self_attention import GSPN2SelfAttention, add_grid_hooks
from gspn2_diffusion.layers.mixer import GSPN2Mixer

CONFIG_KEY = "gspn2_conversion"
PACKAGE = "gspn2-diffusion"
# Components of a pipeline that may hold the self-attention, the first that is there counts.
DENOISERS = ("unet", "transformer")


def convert_to_gspn2(
    model: Any,
    layers: Layers = "all",
    proxy_ratio: int = 8,
    init: str = "attention",
    keep_attention: Layers | int | None = None,
    num_weight_groups: int = 1,
    chunk_size: int | None = None,
    **loading: Any,
) -> Any:
    """Replace self-attention (``attn1``) by :class:`GSPN2Mixer`, in place.

    Works with the UNets of Stable Diffusion 1.5 and XL and with the PixArt, Sana and DiT transformers of
    diffusers, at any picture size, square or not. The model keeps its weights apart from the replaced layers
    and stays an instance of its class, so its stock pipelines, LoRA, offloading and ``torch.compile`` go on
    working; ``save_pretrained`` notes what was converted. A converted model needs distillation or
    fine-tuning: the new layers only start near the old ones.

    Args:
        model: the model; or a pipeline, of which the UNet or transformer is converted; or the name of
            either, a local folder or Hub id, which is loaded first (with ``loading``, e.g. ``dtype=``).
        layers: "all", a module name or pattern such as ``"up_blocks.*"``, or a list of them.
        proxy_ratio: the scan runs in ``dim // proxy_ratio`` channels, at least 1. 8 is the paper's.
        init: "attention" starts near the replaced layer where its shapes allow, "random" as a fresh
            mixer, "zero" with an output of zero.
        keep_attention: layers that stay as they are: a number (spread evenly over the depth), a name or
            pattern, or a list. A few attention layers keep pairwise mixing (C-GSPN, arXiv 2606.00746).
        num_weight_groups, chunk_size: of the mixers.

    Returns:
        The same object, or what was loaded. A model already converted in part may be converted further.
        A pipeline notes the class of its model: to save a pipeline, convert the pipeline, not its model.

    Raises:
        TypeError: no model, or arguments of a wrong type.
        ValueError: a model or layer that cannot be converted (which, and why), or a value out of range.
        OSError: a name that cannot be loaded.
    """
    _check_options(proxy_ratio, init)
    if isinstance(model, (str, os.PathLike)):
        from gspn2_diffusion.conversion.loading import load_for_conversion

        model = load_for_conversion(model, **loading)
    elif loading:
        raise TypeError(
            f"unexpected arguments {sorted(loading)}: they are for models that are loaded by name."
        )
    denoiser = find_denoiser(model)
    chosen = _choose(denoiser, layers, keep_attention)
    attentions = families.attention_layers(denoiser)
    for name in chosen:
        families.check_replaceable(name, attentions[name])
    for name in chosen:
        attention: Any = attentions[name]
        proxy_dim = max(1, attention.query_dim // proxy_ratio)
        settings = {
            "proxy_dim": proxy_dim,
            "num_weight_groups": num_weight_groups,
            "chunk_size": chunk_size,
        }
        _replace(denoiser, name, attention, settings, init)
    _tell_pipeline(model, denoiser)
    return model


def _tell_pipeline(model: Any, denoiser: Any) -> None:
    """A pipeline notes the classes of its components when it gets them, and saves that note."""
    for name, component in getattr(model, "components", {}).items():
        if component is denoiser:
            model.register_modules(**{name: denoiser})


def find_denoiser(model: Any) -> Any:
    """The model itself, or the UNet or transformer of a pipeline.

    Raises:
        TypeError, ValueError: neither, or a model that cannot be converted.
    """
    if hasattr(model, "components"):
        found = [model.components[name] for name in DENOISERS if model.components.get(name) is not None]
        if not found:
            raise ValueError(f"the pipeline {type(model).__name__} has neither {' nor '.join(DENOISERS)}.")
        model = found[0]
    model = getattr(model, "_orig_mod", model)
    families.check_family(model)
    return model


def _check_options(proxy_ratio: Any, init: Any) -> None:
    if isinstance(proxy_ratio, bool) or not isinstance(proxy_ratio, int) or proxy_ratio < 1:
        raise ValueError(f"proxy_ratio must be an integer of at least 1, got {proxy_ratio!r}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}.")


def _choose(model: Any, layers: Layers, keep_attention: Layers | int | None) -> list[str]:
    attentions = families.attention_layers(model)
    done = families.converted_layers(model)
    open_layers = [name for name in attentions if name not in done]
    if not open_layers:
        raise ValueError(f"layers: {type(model).__name__} has no self-attention layer left to convert.")
    chosen = families.select_layers(open_layers, layers, "layers")
    kept = families.select_kept(chosen, keep_attention)
    chosen = [name for name in chosen if name not in kept]
    if not chosen:
        raise ValueError(f"keep_attention={keep_attention!r} keeps every layer that layers={layers!r} names.")
    return chosen


def _replace(model: Any, name: str, attention: Attention, settings: dict[str, Any], init: str) -> None:
    like = attention.to_v.weight
    with torch.device(like.device):
        mixer = GSPN2Mixer(attention.query_dim, **settings)
    initialize_mixer(mixer, init, attention, families.native_grid(model, name), name)
    layer = GSPN2SelfAttention(mixer.to(like.dtype)).train(attention.training)
    layer.requires_grad_(like.requires_grad)
    _put(model, name, layer, {"dim": attention.query_dim, **settings})


def _put(model: Any, name: str, layer: GSPN2SelfAttention, record: dict[str, Any]) -> None:
    from gspn2_diffusion.conversion.converted_models import become_converted

    model.set_submodule(name, layer)
    become_converted(model)
    add_grid_hooks(model)
    conversion = dict(model.config.get(CONFIG_KEY) or {"package": PACKAGE, "layers": {}})
    conversion["layers"] = {**conversion["layers"], name: record}
    model.register_to_config(**{CONFIG_KEY: conversion})


def rebuild(model: Any, conversion: dict[str, Any]) -> None:
    """Give a freshly built model the layers that a saved ``conversion`` records, without weights.

    Raises:
        ValueError: the record does not fit the model.
    """
    attentions = families.attention_layers(model)
    for name, record in conversion["layers"].items():
        if name not in attentions:
            raise ValueError(f"{CONFIG_KEY}: {type(model).__name__} has no layer {name!r}.")
        _put(model, name, GSPN2SelfAttention(GSPN2Mixer(**record)), record)
