"""From a dropped picture back to the settings that drew it. Uploads come from strangers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from gspn2_diffusion.png_metadata import (
    JSON_KEY,
    TEXT_KEY,
    GenerationSettings,
    MetadataError,
    parse_parameters,
    read_text,
)
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import Limits
from gspn2_diffusion.webapp.pictures import check_upload


@dataclass(frozen=True)
class Restored:
    """Settings found in a picture; None where it does not say. ``note`` tells what to know about them."""

    prompt: str
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    scheduler: str | None = None
    model: str = ""
    model_hash: str = ""
    loras: list[dict[str, Any]] = field(default_factory=list)
    few_steps: bool | None = None
    note: str = ""


def restore(path: str | os.PathLike[str], limits: Limits) -> Restored:
    """The settings inside a PNG, JPEG or WebP of ours, or of a program that writes AUTOMATIC1111's text.

    Raises:
        AppError: not acceptable (:func:`check_upload`), damaged, or no settings inside.
    """
    check_upload(path, limits)
    try:
        text = read_text(path)
        if JSON_KEY in text:
            return from_settings(GenerationSettings.from_json(text[JSON_KEY]))
    except (MetadataError, OSError):  # their messages name the server's path
        raise AppError("The picture is damaged, or its settings cannot be read.") from None
    if TEXT_KEY not in text:
        raise AppError(
            "The picture carries no settings: another program made it, or one saved it again without them."
        )
    return _from_parameters(parse_parameters(text[TEXT_KEY]))


def from_settings(settings: GenerationSettings) -> Restored:
    """All of a picture's own settings."""
    return Restored(
        prompt=settings.prompt,
        negative_prompt=settings.negative_prompt,
        steps=settings.steps,
        guidance_scale=float(settings.guidance_scale),
        seed=settings.seed,
        width=settings.width,
        height=settings.height,
        scheduler=settings.scheduler,
        model=settings.model,
        model_hash=settings.model_hash,
        loras=list(settings.loras),
        few_steps=settings.few_steps,
        note="It was drawn from another picture, which is not inside it" if settings.source else "",
    )


def _from_parameters(values: dict[str, str]) -> Restored:
    width, _, height = values.get("Size", "").partition("x")
    return Restored(
        prompt=values.get("Prompt", ""),
        negative_prompt=values.get("Negative prompt", ""),
        steps=_number(values.get("Steps"), int),
        guidance_scale=_number(values.get("CFG scale"), float),
        seed=_number(values.get("Seed"), int),
        width=_number(width, int),
        height=_number(height, int),
        model=values.get("Model", ""),
        model_hash=values.get("Model hash", ""),
        note="Another program drew this picture: the same settings give a different picture here.",
    )


def _number(text: str | None, kind: Any) -> Any:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None
