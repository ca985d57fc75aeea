"""What a visitor may ask for, and the check of everything that comes in."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.webapp.errors import AppError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE_STEP = 16
MAX_SEED = 2**53 - 1  # a browser's numbers are exact up to here
MAX_RANDOM_SEED = 2**32 - 1
RANDOM_SEED = -1
MAX_GUIDANCE = 20.0
MAX_LORA_WEIGHT = 4.0
MIN_STRENGTH = 0.05
MAX_PROMPT = 1000


@dataclass(frozen=True)
class Limits:
    """Upper bounds, set by flags when the server starts.

    Attributes:
        side: pixels of height and of width, twice as many for enlarged pictures; at least ``min_side``.
        steps: denoising steps.
        count: pictures of one request.
        queue: requests that wait or run at once.
        upload_bytes, upload_pixels: of a dropped picture.
    """

    side: int = 512
    min_side: int = 64
    steps: int = 100
    count: int = 8
    queue: int = 16
    upload_bytes: int = 20_000_000
    upload_pixels: int = 16_000_000


@dataclass(frozen=True)
class DrawRequest:
    """A checked wish. Picture k of ``count`` has the seed ``seed + k``; sizes in pixels.

    ``model`` and ``lora`` are names on the shelf, empty for the first model and for none. With a ``picture``
    (RGB, of the size to draw) it is image to image as far as ``strength`` says, with a ``mask`` (L, white is
    drawn anew) inpainting. ``enlarge`` makes it a refinement of ``picture``, which is half as large.
    ``few_steps``: with the model's few-step adapter.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    count: int
    model: str = ""
    lora: str = ""
    lora_weight: float = 1.0
    picture: Image | None = None
    mask: Image | None = None
    strength: float = 1.0
    enlarge: bool = False
    few_steps: bool = False

    @property
    def task(self) -> str:
        """ "text", "img2img", "inpaint" or "enlarge"."""
        if self.picture is None:
            return "text"
        if self.enlarge:
            return "enlarge"
        return "img2img" if self.mask is None else "inpaint"


def check_request(limits: Limits, schedulers: tuple[str, ...], **values: Any) -> DrawRequest:
    """Turns what a page or an API client sent into a request; a seed of -1 becomes a random one.

    Raises:
        AppError: a value is missing, of the wrong kind or outside the limits; the sentence says which.
    """
    count = check_integer("The number of pictures", values["count"], 1, limits.count)
    seed = values["seed"]
    if seed is None or seed == RANDOM_SEED:
        seed = secrets.randbelow(MAX_RANDOM_SEED + 1)
    scheduler = values["scheduler"]
    if scheduler not in schedulers:
        raise AppError(f"The scheduler must be one of {', '.join(schedulers)}.")
    return DrawRequest(
        prompt=_text("The prompt", values["prompt"], required=True),
        negative_prompt=_text("The negative prompt", values["negative_prompt"]),
        width=_side("The width", values["width"], limits),
        height=_side("The height", values["height"], limits),
        steps=check_integer("The number of steps", values["steps"], 1, limits.steps),
        guidance_scale=check_number("Guidance", values["guidance_scale"], 0.0, MAX_GUIDANCE),
        scheduler=scheduler,
        seed=check_integer("The seed", seed, 0, MAX_SEED - count + 1),
        count=count,
        **_choices(values),
    )


def _choices(values: dict[str, Any]) -> dict[str, Any]:
    """Model, LoRA, picture: what need not be there. Names and pictures have been checked by their owners."""
    found: dict[str, Any] = {name: values.get(name) or "" for name in ("model", "lora")}
    found["few_steps"] = bool(values.get("few_steps"))
    weight = values.get("lora_weight", 1.0)
    found["lora_weight"] = check_number("The weight of the LoRA", weight, -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT)
    if values.get("picture") is not None:
        strength = check_number("The strength", values.get("strength"), MIN_STRENGTH, 1.0)
        found.update(picture=values["picture"], mask=values.get("mask"), strength=strength)
    return found


def _text(name: str, value: Any, required: bool = False) -> str:
    text = value if isinstance(value, str) else ""
    if required and not text.strip():
        raise AppError(f"{name} is empty; say what to draw.")
    if len(text) > MAX_PROMPT:
        raise AppError(f"{name} has {len(text)} characters; at most {MAX_PROMPT} are allowed.")
    return text.strip().encode("utf-8", "replace").decode("utf-8")


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float; raises :class:`AppError` unless it is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AppError(f"{name} must be a number from {low:g} to {high:g}.")
    if not low <= value <= high:
        raise AppError(f"{name} must be from {low:g} to {high:g}, got {value:g}.")
    return float(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int; raises :class:`AppError` unless it is a whole number from ``low`` to ``high``."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not low <= value <= high:
        raise AppError(f"{name} must be a whole number from {low} to {high}, got {str(value)[:40]}.")
    return int(value)


def _side(name: str, value: Any, limits: Limits) -> int:
    side = check_integer(name, value, limits.min_side, limits.side)
    if side % SIZE_STEP:
        raise AppError(f"{name} must be a multiple of {SIZE_STEP}, got {side}.")
    return side
