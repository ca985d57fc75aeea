"""Students of attention denoisers: the same model with line scans in the place of self-attention."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.distill_config import DistillConfig

_OWN = "GSPN2Transformer2DModel"


@dataclass(frozen=True)
class Site:
    """A place where the student has a line scan and the teacher attention.

    Attributes:
        name: module name, the same in both models.
        block: name of the block around it.
        width: channels of the tokens.
    """

    name: str
    block: str
    width: int


def find_sites(teacher: nn.Module, student: nn.Module) -> list[Site]:
    """All sites, in order, of our own models and of those of `convert_to_gspn2`.

    A converted layer wraps its mixer, so the site is the outermost module that the teacher has, too.

    Raises:
        ValueError: the student has no line scan that the teacher lacks.
    """
    known, sites = dict(teacher.named_modules()), []
    for name, module in student.named_modules():
        if not isinstance(module, GSPN2Mixer):
            continue
        place = name
        while place and place not in known:
            place = place.rpartition(".")[0]
        if place and not isinstance(known[place], GSPN2Mixer):
            sites.append(Site(place, place.rpartition(".")[0], module.dim))
    if not sites:
        raise ValueError("the student has no line scan where the teacher has attention")
    return sites


def load_teacher(folder: Path, dtype: torch.dtype) -> Any:
    """The denoiser of a folder, frozen, of the class that its configuration names.

    Raises:
        ConfigError: no class of ours or of diffusers.
    """
    import diffusers

    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    found = GSPN2Transformer2DModel if name == _OWN else getattr(diffusers, str(name), None)
    if found is None:
        raise ConfigError(f"`teacher`: {folder} is a {name}, which diffusers does not know")
    return found.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval().requires_grad_(False)


def make_student(teacher: Any, config: DistillConfig) -> Any:
    """A copy of the teacher, in float32, with line scans in the place of its self-attention.

    Raises:
        ConfigError: a layer to keep that is not there, or a model that cannot be converted.
    """
    if type(teacher).__name__ != _OWN:
        return _converted(teacher, config)
    mixers = _own_mixers(teacher, config)
    made: dict[str, Any] = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    width = teacher.config.num_attention_heads * teacher.config.attention_head_dim
    made |= {
        "mixer": mixers,
        "proxy_dim": max(1, width // config.proxy_ratio),
        "num_weight_groups": config.num_weight_groups,
        "chunk_size": config.chunk_size,
    }
    student = type(teacher).from_config(made)
    kept = {
        name: value
        for name, value in teacher.state_dict().items()
        if not any(
            name.startswith(f"transformer_blocks.{index}.mixer.") and kind == "gspn2"
            for index, kind in enumerate(mixers)
        )
    }
    student.load_state_dict(kept, strict=False)
    if config.init == "attention":
        _start_near(student, teacher)
    return student


def _own_mixers(teacher: Any, config: DistillConfig) -> list[str]:
    """Mixer of each layer of the student."""
    count = len(teacher.transformer_blocks)
    before = teacher.config.mixer
    mixers = [before] * count if isinstance(before, str) else list(before)
    attention = [index for index, kind in enumerate(mixers) if kind in ("softmax", "linear")]
    if not attention:
        raise ConfigError("`teacher`: it has no attention layers, there is nothing to distil")
    kept = _kept_layers(attention, config.keep_attention or [])
    return ["gspn2" if index in attention and index not in kept else mixers[index] for index in range(count)]


def _kept_layers(attention: list[int], wanted: list[str]) -> set[int]:
    """Numbers of the layers that stay attention: one number alone counts them, several name them."""
    if not wanted:
        return set()
    if not all(text.isdecimal() for text in wanted):
        raise ConfigError(f"`keep_attention` is {wanted}; this model's layers have numbers: {attention}")
    numbers = [int(text) for text in wanted]
    if len(numbers) == 1:
        if not 0 <= numbers[0] < len(attention):
            raise ConfigError(f"`keep_attention` is {numbers[0]}; allowed: 0 to {len(attention) - 1} layers")
        keep = numbers[0]
        return {attention[(2 * index + 1) * len(attention) // (2 * keep)] for index in range(keep)}
    if not set(numbers) < set(attention):
        raise ConfigError(f"`keep_attention` is {numbers}; allowed: some of {attention}")
    return set(numbers)


def _start_near(student: Any, teacher: Any) -> None:
    """Every mixer averages as its attention would on a uniform picture."""
    from gspn2_diffusion.conversion.initialization import initialize_mixer

    side = max(1, teacher.config.sample_size // teacher.config.patch_size)
    for index, block in enumerate(student.transformer_blocks):
        attention = teacher.transformer_blocks[index].mixer
        if isinstance(block.mixer, GSPN2Mixer) and not isinstance(attention, GSPN2Mixer):
            initialize_mixer(block.mixer, "attention", attention, (side, side), f"layer {index}")


def _converted(teacher: Any, config: DistillConfig) -> Any:
    from gspn2_diffusion.conversion import convert_to_gspn2

    keep: Any = config.keep_attention
    if keep is not None and len(keep) == 1 and keep[0].isdecimal():
        keep = int(keep[0])
    student = copy.deepcopy(teacher).float().requires_grad_(True)
    try:
        return convert_to_gspn2(
            student,
            proxy_ratio=config.proxy_ratio,
            init=config.init,
            keep_attention=keep,
            num_weight_groups=config.num_weight_groups,
            chunk_size=config.chunk_size,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`teacher` cannot be converted: {error}") from error
