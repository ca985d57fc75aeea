"""Contact sheets: pictures in a grid with their captions beneath."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_CAPTION = 48  # pixels beneath a picture


@dataclass(frozen=True)
class SheetPrompt:
    """A fixed prompt of a sheet: its seed, and the set it belongs to ("seen", "unseen" or "free")."""

    prompt: str
    seed: int
    group: str = "free"


def read_prompts(path: str | Path) -> list[SheetPrompt]:
    """Prompts of a JSON list of ``{"prompt", "seed", "group"}``, or of a text file, one a line.

    Raises:
        ValueError: the file holds no prompts.
    """
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".json"):
        rows = [
            SheetPrompt(row["prompt"], row.get("seed", i), row.get("group", "free")) for i, row in _rows(text)
        ]
    else:
        rows = [SheetPrompt(line.strip(), i) for i, line in enumerate(text.splitlines()) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def _rows(text: str) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(json.loads(text)))


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8, tile: int = 192
) -> Image.Image:
    """One picture with all of them, row by row.

    Args:
        pictures: N pictures.
        captions: N captions.
        columns: pictures in a row.
        tile: longest side of a picture on the sheet, in pixels.
    """
    font = ImageFont.load_default(size=12)
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (tile + 8) + 8, rows * (tile + _CAPTION) + 8), (245, 245, 245))
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top, *_ = tile_box(index, columns=columns, tile=tile)
        scale = tile / max(picture.size)
        shape = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        sheet.paste(picture.convert("RGB").resize(shape, Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(caption, max(8, tile // 7))[:3]
        pen.text((left, top + tile + 2), "\n".join(lines), font=font, fill=(20, 20, 20), spacing=1)
    return sheet


def tile_box(index: int, *, columns: int, tile: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a picture's square on a contact sheet."""
    left, top = 8 + index % columns * (tile + 8), 8 + index // columns * (tile + _CAPTION)
    return left, top, left + tile, top + tile


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG beside its name, then rename."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    picture.save(part, format="PNG")
    os.replace(part, target)


def to_pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """PIL pictures from (N, 3, H, W) in -1..1."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array: np.ndarray = bytes_.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(row) for row in array]


def draw_prompts(
    pipeline: Any,
    prompts: Sequence[SheetPrompt],
    *,
    steps: int | None,
    guidance: float | None,
    resolution: int | None = None,
    batch: int = 32,
) -> list[Image.Image]:
    """One picture per prompt from its own seed, so the batch size does not change any of them.

    Without `steps` or `guidance`, GSPN-2 pipelines use those of the model.
    """
    pictures: list[Image.Image] = []
    size = {} if resolution is None else {"height": resolution, "width": resolution}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(item.seed) for item in part]
        pictures += pipeline(
            prompt=[item.prompt for item in part],
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pil",
            **size,
        ).images
    return pictures
