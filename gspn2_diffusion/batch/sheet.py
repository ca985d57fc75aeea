"""Contact sheets: the pictures of a folder on one page, each with its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gspn2_diffusion.batch.manifest import Record

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

MARGIN = 8
LABEL_LINES = 3


def contact_sheet(
    folder: Path, records: Sequence[Record], columns: int | None, size: int, labels: bool
) -> Image:
    """Pictures in rows, scaled down to fit, in the order of ``records``.

    Args:
        folder: what the records' ``file`` is relative to.
        records: finished ones of a manifest, at least one.
        columns: None for a page about as wide as high.
        size: side of the square that a picture fits into, in pixels.
        labels: with the prompt and the seed below each picture.

    Returns:
        One RGB image on white.

    Raises:
        OSError: a picture cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns or math.ceil(math.sqrt(len(records))), len(records))
    rows = math.ceil(len(records) / columns)
    text_size = max(12, size // 14)
    text_height = LABEL_LINES * text_size * 5 // 4 if labels else 0
    cell = (size + MARGIN, size + text_height + MARGIN)
    page = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(text_size)
    for number, record in enumerate(records):
        left, top = (MARGIN + (number % columns) * cell[0], MARGIN + (number // columns) * cell[1])
        with Image.open(folder / record["file"]) as picture:
            small = picture.convert("RGB")
        small.thumbnail((size, size), Image.Resampling.LANCZOS)
        page.paste(small, (left + (size - small.width) // 2, top + (size - small.height) // 2))
        if labels:
            lines = wrap(f"{record['prompt']} (seed {record['seed']})", font, size)
            draw.multiline_text((left, top + size), "\n".join(lines), fill="#333333", font=font, spacing=1)
    return page


def wrap(text: str, font: FreeTypeFont | ImageFont, width: int, lines: int = LABEL_LINES) -> list[str]:
    """``text`` in at most so many lines of so many pixels; what does not fit ends in "...".

    Breaks between words, and within a word only where it is wider than a line.
    """
    result = [""]
    for word in text.split():
        candidate = f"{result[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            result[-1] = candidate
            continue
        if result[-1]:
            result.append("")
        for character in word:
            if font.getlength(result[-1] + character) > width and result[-1]:
                result.append("")
            result[-1] += character
    if len(result) <= lines:
        return result
    last = result[lines - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*result[: lines - 1], f"{last}..."]
