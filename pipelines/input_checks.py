"""Checks of a pipeline call's arguments, made before any heavy work.

Every function names the argument, what came and what is allowed: ``TypeError`` for a wrong type,
``ValueError`` for a value out of range.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import torch

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_prompts(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
) -> int:
    """Checks which prompts came and that their numbers agree; returns the number of prompts."""
    if (prompt is None) == (prompt_embeds is None):
        came = "neither" if prompt is None else "both"
        raise ValueError(f"pass exactly one of `prompt` and `prompt_embeds`, got {came}")
    if isinstance(negative_prompt, (list, tuple)) and negative_prompt_embeds is not None:
        raise ValueError(
            "pass at most one of a list of `negative_prompt` and `negative_prompt_embeds`, got both"
        )
    batch = (
        _check_text("prompt", prompt)
        if prompt_embeds is None
        else _check_embeds("prompt_embeds", prompt_embeds)
    )
    if negative_prompt_embeds is not None:
        negatives = _check_embeds("negative_prompt_embeds", negative_prompt_embeds)
        _check_same_number("negative_prompt_embeds", negatives, batch)
    elif isinstance(negative_prompt, (list, tuple)):
        _check_same_number("negative_prompt", _check_text("negative_prompt", negative_prompt), batch)
    elif negative_prompt is not None:
        _check_text("negative_prompt", negative_prompt)
    return batch


def _check_text(name: str, value: Any) -> int:
    if isinstance(value, str):
        return 1
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be a string or a list of strings, got {type(value).__name__}")
    if not value:
        raise ValueError(f"`{name}` is an empty list; pass at least one string")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise TypeError(f"`{name}[{index}]` must be a string, got {type(item).__name__}")
    return len(value)


def _check_embeds(name: str, value: Any) -> int:
    _check_float_tensor(name, value)
    if value.ndim != 3 or 0 in value.shape:
        raise ValueError(f"`{name}` must have the shape (batch, tokens, channels), got {tuple(value.shape)}")
    return int(value.shape[0])


def _check_float_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, got {value.dtype}")


def _check_same_number(name: str, came: int, batch: int) -> None:
    if came != batch:
        raise ValueError(
            f"`{name}` must have one entry per prompt: {batch} prompts came with {came} of `{name}`"
        )


def check_embeds(
    name: str,
    embeds: torch.Tensor | None,
    mask: torch.Tensor | None,
    pooled: torch.Tensor | None,
    caption_channels: int,
    pooled_dim: int | None,
) -> None:
    """Checks embeddings ``(B, L, caption_channels)``, their mask ``(B, L)`` and pooled vector ``(B, P)``.

    ``name`` is "prompt" or "negative_prompt".
    """
    mask_name, pooled_name = f"{name}_attention_mask", name.replace("prompt", "pooled_prompt_embeds")
    if embeds is None:
        for extra_name, extra in ((mask_name, mask), (pooled_name, pooled)):
            if extra is not None:
                raise ValueError(f"`{extra_name}` came without `{name}_embeds`; pass both or none")
        return
    if embeds.shape[-1] != caption_channels:
        raise ValueError(
            f"`{name}_embeds` must have {caption_channels} channels (the transformer's caption_channels), "
            f"got {embeds.shape[-1]}"
        )
    if mask is None:
        raise ValueError(
            f"`{name}_embeds` came without `{mask_name}`; pass the mask (batch, tokens), 1 = token"
        )
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"`{mask_name}` must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{mask_name}` must have the shape {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}"
        )
    if pooled is not None and pooled_dim is not None:
        _check_float_tensor(pooled_name, pooled)
        expected = (embeds.shape[0], pooled_dim)
        if tuple(pooled.shape) != expected:
            raise ValueError(f"`{pooled_name}` must have the shape {expected}, got {tuple(pooled.shape)}")


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """An integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer, got {type(value).__name__} ({value!r})")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")


def check_number(name: str, value: Any) -> None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {type(value).__name__} ({value!r})")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")


def check_fraction(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1], got {value}")


def check_size(name: str, value: Any, multiple: int) -> None:
    """A picture's height or width in pixels, a multiple of the VAE's scale times the patch size."""
    check_count(name, value)
    if value % multiple:
        below = value // multiple * multiple
        nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
        raise ValueError(
            f"`{name}` must be a multiple of {multiple} pixels (VAE scale x patch size), got {value}; "
            f"nearest allowed: {nearest}"
        )


def check_schedule(num_inference_steps: Any, timesteps: Any, sigmas: Any) -> None:
    """The number of steps, or one explicit schedule: strictly descending, sigmas in (0, 1]."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("pass at most one of `timesteps` and `sigmas`, got both")
    for name, values in (("timesteps", timesteps), ("sigmas", sigmas)):
        if values is not None:
            values_ = _as_floats(name, values)
            if any(b >= a for a, b in pairwise(values_)):
                raise ValueError(f"`{name}` must be strictly descending, got {values_}")
            if name == "sigmas" and not (values_[-1] > 0 and values_[0] <= 1):
                raise ValueError(f"`sigmas` must lie in (0, 1], got {values_}")
    if timesteps is None and sigmas is None:
        check_count("num_inference_steps", num_inference_steps)


def _as_floats(name: str, values: Any) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of numbers, got {type(values).__name__}")
    if not values:
        raise ValueError(f"`{name}` is empty; pass at least one number")
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value)
    return [float(value) for value in values]


def check_generator(generator: Any, images: int, device: torch.device) -> None:
    """None, one generator, or a list with one generator per picture; on the CPU or the pipeline's device."""
    if generator is None:
        return
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    for index, item in enumerate(generators):
        name = f"generator[{index}]" if isinstance(generator, (list, tuple)) else "generator"
        if not isinstance(item, torch.Generator):
            raise TypeError(f"`{name}` must be a torch.Generator, got {type(item).__name__}")
        if item.device.type not in ("cpu", device.type):
            raise ValueError(f"`{name}` must be on cpu or {device.type}, it is on {item.device}")
    if isinstance(generator, (list, tuple)) and len(generators) != images:
        raise ValueError(
            f"`generator` must hold one generator per picture: {images} pictures (prompts x "
            f"num_images_per_prompt), {len(generators)} generators"
        )


def check_latents(latents: Any, shape: Sequence[int], name: str = "latents") -> None:
    """None, or a floating-point tensor of exactly ``shape``."""
    if latents is None:
        return
    _check_float_tensor(name, latents)
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"`{name}` must have the shape {tuple(shape)} for this call, got {tuple(latents.shape)}"
        )


def check_output_type(output_type: Any) -> None:
    """One of ``OUTPUT_TYPES``."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")


def check_callback(callback: Any, tensor_inputs: Any, allowed: Collection[str]) -> None:
    """A callable (or None) and a list of names out of ``allowed``."""
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be callable, got {type(callback).__name__}")
    if not isinstance(tensor_inputs, (list, tuple)):
        raise TypeError(
            "`callback_on_step_end_tensor_inputs` must be a list of names, "
            f"got {type(tensor_inputs).__name__}"
        )
    unknown = [name for name in tensor_inputs if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {list(allowed)}, got {unknown}")


def check_sequence_length(max_sequence_length: Any, tokenizer: Any) -> None:
    """None, or a number of tokens that leaves room for text and that the text encoder can read."""
    if max_sequence_length is None or tokenizer is None:
        return
    check_count("max_sequence_length", max_sequence_length, tokenizer.num_special_tokens_to_add() + 1)
    if max_sequence_length > tokenizer.model_max_length:
        raise ValueError(
            f"`max_sequence_length` must be at most {tokenizer.model_max_length} (the tokenizer's "
            f"model_max_length), got {max_sequence_length}"
        )
