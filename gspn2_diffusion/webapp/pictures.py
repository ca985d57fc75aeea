"""Pictures that strangers send: judged by their header before anything is decoded."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import SIZE_STEP, DrawRequest, Limits

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
_SMALLEST = 8  # pixels of a side


def check_upload(source: str | os.PathLike[str] | bytes, limits: Limits) -> None:
    """Judges a file, or its bytes, by length and header; no pixel is decoded.

    Raises:
        AppError: too long, no PNG, JPEG or WebP, or a picture of more pixels than is sensible.
    """
    from PIL import Image

    try:
        length = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        if length > limits.upload_bytes:
            raise AppError(f"The file is larger than {limits.upload_bytes // 1_000_000} MB.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size, which is judged here
            with Image.open(_opened(source), formats=FORMATS) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        raise AppError("The picture says that it has very many pixels, which is too large.") from None
    except FileNotFoundError:
        raise AppError("The file could not be read; please try again.") from None
    except (OSError, SyntaxError, ValueError):
        raise AppError("This is not a PNG, JPEG or WebP picture, or it is damaged.") from None
    if width * height > limits.upload_pixels:
        raise AppError(f"The picture says it has {width} x {height} pixels, which is too large.")


def _opened(source: str | os.PathLike[str] | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def read_picture(source: str | os.PathLike[str], limits: Limits) -> Image:
    """An uploaded file as RGB, turned as its camera says, what is transparent on white.

    Raises:
        AppError: as :func:`check_upload`, or it cannot be decoded.
    """
    from PIL import Image, ImageOps

    check_upload(source, limits)
    try:
        with Image.open(source, formats=FORMATS) as picture:
            turned = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise AppError("The picture is damaged.") from None
    return on_white(turned)


def on_white(picture: Image) -> Image:
    """``picture`` as RGB."""
    from PIL import Image

    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def painted(layers: list[Image | None]) -> Image | None:
    """What was painted on a picture, white on black; None where nothing was."""
    from PIL import ImageChops

    mask = None
    for layer in layers:
        if layer is None or "A" not in layer.getbands():
            continue
        alpha = layer.getchannel("A").point(lambda value: 255 if value > 20 else 0)
        mask = alpha if mask is None or mask.size != alpha.size else ImageChops.lighter(mask, alpha)
    return mask if mask is not None and mask.getbbox() else None


def fitted(request: DrawRequest) -> DrawRequest:
    """``request`` with its picture and mask cut around their centre and resized to the size to draw."""
    from PIL import Image, ImageOps

    if request.picture is None:
        return request
    size = request.width, request.height
    picture, mask = ImageOps.fit(request.picture, size, method=Image.Resampling.LANCZOS), request.mask
    if mask is not None:
        mask = ImageOps.fit(mask.convert("L"), size, method=Image.Resampling.NEAREST)
        if mask.getbbox() is None:
            raise AppError("The mask is outside the part of the picture that is drawn.")
    return dataclasses.replace(request, picture=picture, mask=mask)


def check_picture(picture: Image, mask: Image | None) -> None:
    """Raises :class:`AppError` for a picture that is too small, or a mask of another size or empty."""
    if min(picture.size) < _SMALLEST:
        raise AppError(f"The picture must have at least {_SMALLEST} x {_SMALLEST} pixels.")
    if mask is not None and mask.size != picture.size:
        raise AppError(
            f"The mask must have the size of the picture, {picture.width} x {picture.height}, "
            f"got {mask.width} x {mask.height}."
        )
    if mask is not None and mask.getbbox() is None:
        raise AppError("The mask is empty; paint white over what is to be drawn anew.")


def natural_size(size: tuple[int, int], base: int, smallest: int, largest: int) -> tuple[int, int]:
    """Width and height for drawing a picture of ``size`` anew: its shape, about ``base * base`` pixels."""
    scale = base / (size[0] * size[1]) ** 0.5
    width, height = (round(side * scale / SIZE_STEP) * SIZE_STEP for side in size)
    low, high = -(-smallest // SIZE_STEP) * SIZE_STEP, largest // SIZE_STEP * SIZE_STEP
    return max(low, min(width, high)), max(low, min(height, high))
