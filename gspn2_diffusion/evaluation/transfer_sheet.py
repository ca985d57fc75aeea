"""One picture of what several models draw for the same prompts at several sizes, cut from their sheets."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gspn2_diffusion.evaluation.report import SHEET_COLUMNS as COLUMNS
from gspn2_diffusion.evaluation.report import SHEET_TILE as TILE
from gspn2_diffusion.training.sheets import tile_box

_LABEL = 120


def _sheets(folder: Path) -> list[tuple[str, Path]]:
    """Labels and sheets of one model, small pictures first; the size stands in the scores beside a sheet."""
    found = []
    for path in folder.glob("sheet*.png"):
        scores = path.with_name(path.name.replace("sheet", "results")).with_suffix(".json")
        settings = json.loads(scores.read_text(encoding="utf-8"))["settings"]
        high, wide = settings["height"], settings["width"]
        found.append((high * wide, f"{folder.parent.name}\n{high} x {wide}", path))
    if not found:
        raise FileNotFoundError(f"there are no sheets in {folder}")
    return [(label, path) for _, label, path in sorted(found)]


def transfer_sheet(folders: Sequence[Path], target: Path, *, prompts: int = 10) -> Path:
    """Write the first ``prompts`` pictures of every sheet, one row for a model at a size.

    Args:
        folders: ``<model>/evaluation`` of every model, with what ``evaluate.py --sizes`` wrote.
        target: the picture; its ending says the format.
        prompts: at most the sheets' columns; the same prompts stand in the same places of all sheets.

    Raises:
        FileNotFoundError: a folder without sheets.
        ValueError: ``prompts`` out of range.
    """
    if not 1 <= prompts <= COLUMNS:
        raise ValueError(f"prompts must be between 1 and {COLUMNS}, got {prompts}.")
    rows = [row for folder in folders for row in _sheets(folder)]
    step = TILE + 8
    whole = Image.new("RGB", (_LABEL + prompts * step + 8, len(rows) * step + 8), (245, 245, 245))
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=14)
    for number, (label, path) in enumerate(rows):
        top = 8 + number * step
        pen.text((8, top + TILE // 2 - 18), label, font=font, fill=(20, 20, 20))
        with Image.open(path) as sheet:
            for index in range(prompts):
                box = tile_box(index, columns=COLUMNS, tile=TILE)
                whole.paste(sheet.crop(box), (_LABEL + index * step, top))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{target.name}")
    whole.save(part, quality=80)
    os.replace(part, target)
    return target
