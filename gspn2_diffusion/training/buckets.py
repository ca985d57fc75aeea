"""Aspect-ratio buckets: the sizes that pictures are scaled and cropped to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Buckets:
    """Sizes of about ``resolution**2`` pixels whose sides are multiples of ``multiple``.

    As in NovelAI's aspect-ratio bucketing: for every width the tallest height that keeps the area.

    Args:
        resolution: side of the square bucket in pixels.
        multiple: sides are multiples of this.
        max_ratio: longest side over shortest; 1 for squares alone.
    """

    resolution: int
    multiple: int
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.resolution < self.multiple or self.resolution % self.multiple:
            raise ValueError(
                f"`resolution` is {self.resolution}; this model needs a multiple of {self.multiple}"
            )
        if self.max_ratio < 1.0:
            raise ValueError(f"`max_aspect_ratio` is {self.max_ratio}; allowed: 1 or more")

    def sizes(self) -> list[tuple[int, int]]:
        """All (height, width), widest last."""
        step, area = self.multiple, self.resolution**2
        found = {(self.resolution, self.resolution)}
        for units in range(1, math.ceil(self.resolution * self.max_ratio / step) + 1):
            width = units * step
            height = area // width // step * step
            if height and max(width, height) / min(width, height) <= self.max_ratio:
                found |= {(height, width), (width, height)}
        return sorted(found, key=lambda size: size[1] / size[0])

    def nearest(self, height: int, width: int) -> tuple[int, int]:
        """The bucket (height, width) whose aspect ratio is nearest to a picture's."""
        wanted = math.log(width / height)
        return min(self.sizes(), key=lambda size: abs(math.log(size[1] / size[0]) - wanted))

    def fit(self, picture: Image.Image) -> Tensor:
        """Scale to cover the nearest bucket and cut the middle out: (3, height, width) float32 in -1..1."""
        height, width = self.nearest(picture.height, picture.width)
        scale = max(height / picture.height, width / picture.width)
        left = (picture.width - width / scale) / 2
        top = (picture.height - height / scale) / 2
        box = (left, top, left + width / scale, top + height / scale)
        scaled = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
        return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float() / 127.5 - 1.0
