"""Picture files of any kind to RGB, or a plain reason why not."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 250_000_000  # larger ones are taken for decompression bombs


class DamagedPictureError(ValueError):
    """A picture that cannot be used; the message says why."""


def read_rgb(data: bytes, max_pixels: int = MAX_PIXELS, min_side: int = 1) -> Image.Image:
    """Decode a picture.

    The first frame of an animation is taken, orientation tags are applied, transparency becomes white, and
    16-bit, CMYK, palette and grey pictures become 8-bit RGB.

    Args:
        data: content of the file.
        max_pixels: refused above, before anything is decoded.
        min_side: refused below, in pixels.

    Returns:
        An RGB picture.

    Raises:
        DamagedPictureError: empty, truncated, unknown, too large or too small.
    """
    if not data:
        raise DamagedPictureError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning; the limit below is stricter
            picture: Image.Image = Image.open(io.BytesIO(data))
        width, height = picture.size
        if width * height > max_pixels:
            raise DamagedPictureError(f"{width}x{height} is more than {max_pixels:,} pixels")
        picture.load()
        picture = ImageOps.exif_transpose(picture) or picture
        found = _to_rgb(picture)
    except DamagedPictureError:
        raise
    except Image.DecompressionBombError as error:
        raise DamagedPictureError(str(error)) from error
    except Exception as error:  # decoders raise nearly anything on broken data
        raise DamagedPictureError(f"{type(error).__name__}: {error}") from error
    if min(found.size) < min_side:
        raise DamagedPictureError(f"{width}x{height} is smaller than {min_side} pixels")
    return found


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 or 32 bits of grey; convert() would cut them off at 255
        values = np.asarray(picture).astype(np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    elif picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        top = 1.0 if values.max(initial=0) <= 1.0 else 255.0
        picture = Image.fromarray((values.clip(0, top) * (255.0 / top)).round().astype(np.uint8))
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        below = Image.new("RGBA", above.size, (255, 255, 255, 255))
        return Image.alpha_composite(below, above).convert("RGB")
    return picture.convert("RGB")
