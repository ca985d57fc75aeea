"""Scenes composed on the device: sprites over a background, a whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Layer:
    """One object in each of N successive scenes.

    Attributes:
        first: the first scene of the batch that gets the object.
        sprite: (N,) int64, rows of the sprite table.
        centre: (N, 2) float32, x to the right and y down, -1..1 over the picture.
        size: (N,) float32, side of the sprite as a share of the picture's side.
    """

    first: int
    sprite: Tensor
    centre: Tensor
    size: Tensor
    typical_size: float = 1.0  # decides the sprite's resolution level; a plain number, so nothing waits

    def to(self, device: torch.device) -> Layer:
        """The same layer on `device`; the copy does not wait."""
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in ("sprite", "centre", "size")}
        return replace(self, **moved)


@dataclass
class SceneBatch:
    """What to draw: N backgrounds, objects from back to front, and the words for each scene.

    Attributes:
        background: (N, 3, h, w) float32 in 0..1; stretched smoothly over the picture (1x1: one colour).
        layers: objects, back to front.
        captions: N captions, empty where no words are needed.
    """

    background: Tensor
    layers: list[Layer]
    captions: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> SceneBatch:
        """The same batch on `device`; copies do not wait."""
        layers = [layer.to(device) for layer in self.layers]
        return replace(self, background=self.background.to(device, non_blocking=True), layers=layers)

    def pin_memory(self) -> SceneBatch:
        """The same batch in page-locked memory."""
        layers = [
            replace(x, sprite=x.sprite.pin_memory(), centre=x.centre.pin_memory(), size=x.size.pin_memory())
            for x in self.layers
        ]
        return replace(self, background=self.background.pin_memory(), layers=layers)


@torch.no_grad()
def compose(sprites: Tensor, scenes: SceneBatch, resolution: int) -> Tensor:
    """Draw scenes.

    Args:
        sprites: uint8 (S, 4, side, side), RGBA with straight alpha.
        scenes: on the device of `sprites`.
        resolution: side of the pictures in pixels.

    Returns:
        float32 (N, 3, resolution, resolution) in -1..1.
    """
    canvas = _backdrop(scenes.background, resolution)
    for layer in scenes.layers:
        colour, alpha = _placed(sprites, layer, resolution)
        target = canvas[layer.first : layer.first + len(layer.sprite)]
        target.mul_(1 - alpha).add_(colour)
    return canvas.clamp_(0, 1).mul_(2).sub_(1)


def _backdrop(background: Tensor, resolution: int) -> Tensor:
    if background.shape[-2:] == (1, 1):
        return background.expand(-1, -1, resolution, resolution).clone()
    return F.interpolate(background, size=(resolution, resolution), mode="bilinear", align_corners=True)


def _placed(sprites: Tensor, layer: Layer, resolution: int) -> tuple[Tensor, Tensor]:
    """Premultiplied colour (N, 3, R, R) and alpha (N, 1, R, R) of the objects on an empty picture."""
    picture = sprites[layer.sprite].float().div_(255)
    picture[:, :3].mul_(picture[:, 3:])  # premultiplied, or transparent pixels bleed into the edges
    level = _level(picture.shape[-1], resolution * layer.typical_size)
    if level:
        picture = F.avg_pool2d(picture, 2**level)
    grid = _sampling_grid(layer, resolution)
    placed = F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return placed[:, :3], placed[:, 3:]


def _sampling_grid(layer: Layer, resolution: int) -> Tensor:
    """Where each pixel lies on the sprite, (N, R, R, 2).

    Written out because `F.affine_grid` is a matrix product, which TF32 or autocast would round to tenths of
    a pixel.
    """
    steps = torch.arange(resolution, device=layer.size.device, dtype=torch.float32)
    points = (steps * 2 + 1) / resolution - 1  # pixel centres
    places = (points[None, :, None] - layer.centre[:, None, :]) / layer.size[:, None, None]  # (N, R, 2)
    across = places[:, None, :, 0].expand(-1, resolution, -1)
    down = places[:, :, None, 1].expand(-1, -1, resolution)
    return torch.stack([across, down], dim=-1)


def _level(side: int, drawn: float) -> int:
    """Halvings after which bilinear sampling shrinks the sprite by at most about 1.4."""
    return max(0, min(round(math.log2(side / max(drawn, 1.0))), int(math.log2(side))))
