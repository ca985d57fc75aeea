"""What a model understands best, as data: chips, examples, sizes. One entry for each model that has some."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gspn2_diffusion.webapp.limits import SIZE_STEP

FALLBACK_SIZE = 512
FALLBACK_LAYERS = 12

ASPECTS: dict[str, tuple[int, int]] = {
    "1:1": (1, 1),
    "4:3": (4, 3),
    "3:4": (3, 4),
    "3:2": (3, 2),
    "2:3": (2, 3),
    "16:9": (16, 9),
    "9:16": (9, 16),
}


@dataclass(frozen=True)
class Vocabulary:
    """Chips of the page. ``backgrounds`` gives each colour's CSS value."""

    styles: tuple[str, ...] = ()
    backgrounds: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()

    @property
    def background_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.backgrounds)


EMOJI = Vocabulary(
    styles=("3d", "flat", "noto", "blob", "twemoji", "emojione", "firefox os", "streamline"),
    backgrounds=(
        ("white", "#ffffff"),
        ("black", "#0c0c0c"),
        ("gray", "#808080"),
        ("red", "#d62828"),
        ("orange", "#f78c1e"),
        ("yellow", "#fcdc3c"),
        ("green", "#38a046"),
        ("light green", "#aae2a0"),
        ("teal", "#148c8c"),
        ("blue", "#285adc"),
        ("light blue", "#a0d4f5"),
        ("navy", "#141e5a"),
        ("purple", "#7d3cb4"),
        ("pink", "#faa0c3"),
        ("brown", "#784b28"),
        ("beige", "#eedebe"),
    ),
    examples=(
        "a penguin",
        "a rocket",
        "a slice of pizza",
        "a blue apple",
        "a cat, flat style, on a yellow background",
        "a lion to the left of a red car",
    ),
)

_BY_MODEL = {"gspn2-emoji": EMOJI}


def vocabulary_of(model: str) -> Vocabulary:
    """The chips of a model by its display name; none for a model that is not known."""
    return _BY_MODEL.get(model, Vocabulary(examples=("a penguin", "a rocket")))


def compose_prompt(prompt: str, style: str | None, background: str | None) -> str:
    """``a red apple`` + ``flat`` + ``blue`` -> ``a red apple, flat style, on a blue background``."""
    parts = [prompt.strip().rstrip(",")]
    if style:
        parts.append(f"{style} style")
    if background:
        parts.append(f"on {'an' if background[0] in 'aeiou' else 'a'} {background} background")
    return ", ".join(part for part in parts if part) if parts[0] else ""


def split_prompt(prompt: str, words: Vocabulary) -> tuple[str, str | None, str | None]:
    """The inverse of :func:`compose_prompt` for the model's own words; other prompts come back whole."""
    background = style = None
    if found := re.fullmatch(r"(.+), on an? ([a-z ]+) background", prompt):
        if found[2] not in words.background_names:
            return prompt, None, None
        prompt, background = found[1], found[2]
    found = re.fullmatch(r"(.+), ([a-z0-9 ]+) style", prompt)
    if found and found[2] in words.styles:
        prompt, style = found[1], found[2]
    return prompt, style, background


def aspect_size(aspect: str, base: int, largest: int) -> tuple[int, int]:
    """Width and height in pixels of about ``base * base`` pixels in all, both multiples of 16."""
    across, down = ASPECTS[aspect]
    scale = base / (across * down) ** 0.5
    return _fit(across * scale, largest), _fit(down * scale, largest)


def _fit(side: float, largest: int) -> int:
    return max(SIZE_STEP, min(round(side / SIZE_STEP), largest // SIZE_STEP) * SIZE_STEP)


def layer_count(source: str) -> int:
    """Layers of a model's transformer, without loading it; ``FALLBACK_LAYERS`` before a download."""
    try:
        path = Path(source) / "transformer" / "config.json"
        return int(json.loads(path.read_text(encoding="utf-8"))["num_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return FALLBACK_LAYERS


def base_size(source: str) -> int:
    """Side in pixels that a model was trained for, from its folder's configurations, without loading it.

    Args:
        source: a folder, or a Hub id, whose size is not known before the download.
    """
    folder = Path(source)
    if not os.path.isdir(folder):
        return FALLBACK_SIZE
    try:
        transformer = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        stages = vae.get("encoder_block_out_channels") or vae["block_out_channels"]
        return int(transformer["sample_size"] * 2 ** (len(stages) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        return FALLBACK_SIZE
