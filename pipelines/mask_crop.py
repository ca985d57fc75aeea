"""Inpainting at a higher resolution: only the surroundings of the mask are drawn, then put back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import PIL.Image
from diffusers.image_processor import VaeImageProcessor

from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.image_inputs import MASK_MODES, on_white


@dataclass
class MaskCrop:
    """A part of a picture that holds the mask.

    Attributes:
        image: the whole picture, RGB.
        mask: the whole mask, mode L, 0 or 255.
        box: left, upper, right, lower of the part, in pixels.
    """

    image: PIL.Image.Image
    mask: PIL.Image.Image
    box: tuple[int, int, int, int]

    @classmethod
    def find(cls, image: Any, mask: Any, padding: Any, output_type: str, height: int, width: int) -> MaskCrop:
        """The part around the mask with ``padding`` pixels on all sides, widened to ``height : width``.

        Raises:
            TypeError, ValueError: anything but one PIL picture and one PIL mask of its size that marks
                something, a padding below 0, or another output than PIL pictures.
        """
        input_checks.check_count("padding_mask_crop", padding, minimum=0)
        for name, value in (("image", image), ("mask_image", mask)):
            if not isinstance(value, PIL.Image.Image):
                raise TypeError(
                    f"`{name}` must be one PIL picture with `padding_mask_crop`, got {type(value).__name__}"
                )
        if output_type != "pil":
            raise ValueError(
                f"`output_type` must be 'pil' with `padding_mask_crop`, since the parts are pasted into the "
                f"picture, got {output_type!r}"
            )
        if mask.size != image.size:
            raise ValueError(
                f"`mask_image` must have the size of `image`, {image.height} x {image.width} pixels "
                f"(height x width), got {mask.height} x {mask.width}"
            )
        if mask.mode not in MASK_MODES:
            raise ValueError(f"`mask_image` must have one of the modes {MASK_MODES}, got {mask.mode!r}")
        marked = mask.convert("L").point(lambda value: 255 * (value > 127))
        if marked.getbbox() is None:
            raise ValueError("`mask_image` marks nothing (no pixel over one half), nothing to crop to")
        box = VaeImageProcessor.get_crop_region(marked, width, height, pad=padding)
        return cls(on_white(image), marked, box)

    def cut(self) -> tuple[PIL.Image.Image, PIL.Image.Image]:
        """Picture and mask of the part, in their own resolution."""
        return self.image.crop(self.box), self.mask.crop(self.box)

    def paste(self, drawn: PIL.Image.Image, blur: float, keep_unmasked: bool) -> PIL.Image.Image:
        """The whole picture with the part, drawn at any size, in its place.

        ``keep_unmasked`` keeps the pixels outside the mask, whose edge has a radius of ``blur`` pixels.
        """
        left, upper, right, lower = self.box
        part = drawn.resize((right - left, lower - upper), PIL.Image.Resampling.LANCZOS)
        if keep_unmasked:
            own, mask = self.cut()
            part = PIL.Image.composite(part, own, VaeImageProcessor.blur(mask, blur) if blur else mask)  # type: ignore[arg-type]
        whole = self.image.copy()
        whole.paste(part, (left, upper))
        return whole
