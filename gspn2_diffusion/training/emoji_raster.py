"""Emoji pictures to pixels: crop to the drawn part, fit into a square, many at once on all cores."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

    from gspn2_diffusion.training.emoji import EmojiRecord

logger = logging.getLogger(__name__)

MARGIN = 0.04  # of the square's side, left free on every side
_FAINT = 8  # alpha at or below this does not count as drawn: soft shadows would shift the crop
_PROBE = 96  # side in pixels of the first look at an SVG
_LARGEST = 4  # an SVG canvas grows at most to this many times the wanted side
_CHUNK = 16  # pictures that a worker takes at a time
_VERSION = 1  # part of the cache key; raise it when the pixels change
_ROOT = re.compile(r"<svg\b[^>]*>", re.S)
_SIDE = re.compile(r'\s(?:width|height)="[^"]*"')
_VIEW_BOX = re.compile(r'viewBox="\s*[-\d.e]+[\s,]+[-\d.e]+[\s,]+([\d.e]+)[\s,]+([\d.e]+)\s*"')


class EmojiPictureError(ValueError):
    """A picture file is missing, damaged or empty; the message names it."""


def rasterize(record: EmojiRecord | str | Path, size: int) -> np.ndarray:
    """Draw one picture, cropped to what is drawn, centred and fitted with a small margin.

    Args:
        record: a record, or the path of an ``.svg`` or ``.webp``/``.png`` file.
        size: side of the square in pixels, at least 8.

    Returns:
        uint8 array (size, size, 4), RGBA with straight alpha, fully transparent outside the object.

    Raises:
        EmojiPictureError: the file is missing, damaged or shows nothing.
        ValueError: `size` is too small.
    """
    if size < 8:
        raise ValueError(f"`size` is {size}; at least 8 pixels are needed")
    path = Path(record) if isinstance(record, (str, Path)) else record.path
    try:
        data = path.read_bytes()
        image = _draw_svg(data.decode("utf-8"), size) if path.suffix == ".svg" else _open_bitmap(data)
        return _fit(image, size)
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        raise EmojiPictureError(f"{path}: {error}") from error


def _open_bitmap(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image.load()
    return image


def _render(svg: str, width: float, height: float) -> Image.Image:
    from resvg import render, usvg

    root = _ROOT.search(svg)
    if root is None:
        raise ValueError("no <svg> element")
    head = _SIDE.sub("", root.group())
    head = head.replace("<svg", f'<svg width="{width:.3f}" height="{height:.3f}"', 1)
    document = svg[: root.start()] + head + svg[root.end() :]
    try:
        tree = usvg.Tree.from_str(document, usvg.Options.default())
        drawn = bytes(render(tree, (1, 0, 0, 0, 1, 0)))  # the transform is row by row
    except BaseException as error:  # bad input makes resvg panic, which is no Exception in Python
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"resvg cannot read it: {error}") from None
    return _open_bitmap(drawn)


def _draw_svg(svg: str, size: int) -> Image.Image:
    """Render so large that the drawn part, not the canvas, comes out `size` pixels long."""
    box = _VIEW_BOX.search(svg)
    if box is None:
        raise ValueError("no viewBox")
    width, height = float(box.group(1)), float(box.group(2))
    if min(width, height) <= 0:
        raise ValueError(f"viewBox of {width} x {height}")
    unit = _PROBE / max(width, height)
    left, top, right, bottom = _drawn_box(_render(svg, width * unit, height * unit))
    share = max(right - left, bottom - top) / _PROBE
    unit = min(size * (1 - 2 * MARGIN) / share, size * _LARGEST) / max(width, height)
    return _render(svg, width * unit, height * unit)


def _drawn_box(image: Image.Image) -> tuple[int, int, int, int]:
    box = image.getchannel("A").point([0] * (_FAINT + 1) + [255] * (255 - _FAINT)).getbbox()
    if box is None:
        raise ValueError("the picture is empty")
    return box


def _fit(image: Image.Image, size: int) -> np.ndarray:
    drawn = image.crop(_drawn_box(image))
    room = max(1, round(size * (1 - 2 * MARGIN)))
    scale = room / max(drawn.size)
    shape = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    # premultiplied ("RGBa") while resizing, or transparent pixels bleed their colour into the edge
    resized = drawn.convert("RGBa").resize(shape, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(resized, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.array(canvas)


def load_sprites(
    records: Sequence[EmojiRecord],
    size: int = 256,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    errors: Literal["raise", "blank"] = "raise",
) -> torch.Tensor:
    """Draw all pictures on all cores.

    Args:
        records: N records.
        size: side of the squares in pixels.
        workers: processes; None takes the cores this process may use.
        cache_dir: folder for the drawn pixels, reused when records, files and size are the same.
        errors: "raise" ends with one error that names every damaged picture; "blank" logs their names and
            count and leaves them fully transparent, so that rows still match `records`.

    Returns:
        uint8 tensor (N, 4, size, size), RGBA with straight alpha.

    Raises:
        EmojiPictureError: pictures are damaged and `errors` is "raise".
    """
    import torch

    if errors not in ("raise", "blank"):
        raise ValueError(f"`errors` is {errors!r}; allowed: 'raise', 'blank'")
    cached = Path(cache_dir) / f"sprites-{_cache_key(records, size)}.npy" if cache_dir is not None else None
    if cached is not None and cached.is_file():
        return torch.from_numpy(np.load(cached))
    sprites = np.zeros((len(records), 4, size, size), dtype=np.uint8)
    damaged = []
    for index, result in enumerate(_drawn(records, size, workers)):
        if isinstance(result, str):
            damaged.append(result)
        else:
            sprites[index] = result
    if damaged:
        _report_damaged(damaged, len(records), errors)
    elif cached is not None:
        _save(cached, sprites)
    return torch.from_numpy(sprites)


def _report_damaged(damaged: list[str], total: int, errors: str) -> None:
    shown = "; ".join(damaged[:20]) + (f"; and {len(damaged) - 20} more" if len(damaged) > 20 else "")
    message = f"{len(damaged)} of {total} pictures are damaged: {shown}"
    if errors == "raise":
        raise EmojiPictureError(message)
    logger.warning("%s", message)


def _drawn(records: Sequence[EmojiRecord], size: int, workers: int | None) -> Iterator[np.ndarray | str]:
    paths = [(str(record.path), size) for record in records]
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    if workers <= 1 or len(paths) < 64:
        yield from map(_draw_one, paths)
        return
    # fork: a spawned worker would import the training script, and torch with it, once per process
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(workers, -(-len(paths) // _CHUNK)), mp_context=context) as pool:
        yield from pool.map(_draw_one, paths, chunksize=_CHUNK)


def _draw_one(job: tuple[str, int]) -> np.ndarray | str:
    path, size = job
    try:
        return np.ascontiguousarray(rasterize(path, size).transpose(2, 0, 1))
    except EmojiPictureError as error:
        return str(error)


def _cache_key(records: Sequence[EmojiRecord], size: int) -> str:
    rows: list[Any] = [_VERSION, size]
    for record in records:
        stat = record.path.stat() if record.path.exists() else None
        rows.append([record.id, stat.st_size if stat else -1])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:24]


def _save(target: Path, sprites: np.ndarray) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, sprites)
        os.replace(name, target)
    except OSError as error:  # a full disk costs the cache, not the run
        Path(name).unlink(missing_ok=True)
        logger.warning("sprites not cached in %s: %s", target, error)
