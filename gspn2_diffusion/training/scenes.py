"""Scenes composed on the device: sprites over a background, a whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusion.training.scene_colours import recolour


@dataclass
class Layer:
    """One object in each of N successive scenes.

    Attributes:
        first: the first scene of the batch that gets the object.
        sprite: (N,) int64, rows of the sprite table.
        centre: (N, 2) float32, x to the right and y down, -1..1 over the picture.
        size: (N,) float32, side of the sprite as a share of the picture's shorter side.
        typical_size: decides the sprite's resolution level; a plain number, so nothing waits.
        pose: (N, 3) float32 or None: turn in radians (clockwise), factor of the width (negative: mirrored),
            factor of the height.
        tinted: (K,) int64 or None, the rows of the layer that are recoloured.
        tints: (K, 6) float32, see `gspn2_diffusion.training.scene_colours.tint`.
    """

    first: int
    sprite: Tensor
    centre: Tensor
    size: Tensor
    typical_size: float = 1.0
    pose: Tensor | None = None
    tinted: Tensor | None = None
    tints: Tensor | None = None

    def to(self, device: torch.device) -> Layer:
        """The same layer on `device`; the copy does not wait."""
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in self._tensors()})

    def pin_memory(self) -> Layer:
        """The same layer in page-locked memory."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors()})

    def _tensors(self) -> list[tuple[str, Any]]:
        found = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return [(name, value) for name, value in found if isinstance(value, Tensor)]


@dataclass
class SceneBatch:
    """What to draw: N backgrounds, objects from back to front, and the words for each scene.

    Attributes:
        background: (N, 3, h, w) float32 in 0..1; stretched smoothly over the picture (1x1: one colour).
        layers: objects, back to front.
        captions: N captions, empty where no words are needed.
        shape: (height, width) in pixels where the scenes are made for one; None leaves it to who draws.
    """

    background: Tensor
    layers: list[Layer]
    captions: list[str] = field(default_factory=list)
    shape: tuple[int, int] | None = None

    def to(self, device: torch.device) -> SceneBatch:
        """The same batch on `device`; copies do not wait."""
        layers = [layer.to(device) for layer in self.layers]
        return replace(self, background=self.background.to(device, non_blocking=True), layers=layers)

    def pin_memory(self) -> SceneBatch:
        """The same batch in page-locked memory."""
        layers = [layer.pin_memory() for layer in self.layers]
        return replace(self, background=self.background.pin_memory(), layers=layers)


@torch.no_grad()
def compose(sprites: Tensor, scenes: SceneBatch, resolution: int | tuple[int, int]) -> Tensor:
    """Draw scenes.

    Args:
        sprites: uint8 (S, 4, side, side), RGBA with straight alpha.
        scenes: on the device of `sprites`.
        resolution: side of the pictures in pixels, or (height, width); the scenes' own shape goes first.

    Returns:
        float32 (N, 3, height, width) in -1..1.
    """
    shape = (resolution, resolution) if isinstance(resolution, int) else resolution
    shape = scenes.shape or shape
    canvas = _backdrop(scenes.background, shape)
    for layer in scenes.layers:
        colour, alpha = _placed(sprites, layer, shape)
        target = canvas[layer.first : layer.first + len(layer.sprite)]
        target.mul_(1 - alpha).add_(colour)
    return canvas.clamp_(0, 1).mul_(2).sub_(1)


def _backdrop(background: Tensor, shape: tuple[int, int]) -> Tensor:
    if background.shape[-2:] == (1, 1):
        return background.expand(-1, -1, *shape).clone()
    return F.interpolate(background, size=shape, mode="bilinear", align_corners=True)


def _placed(sprites: Tensor, layer: Layer, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Premultiplied colour (N, 3, H, W) and alpha (N, 1, H, W) of the objects on an empty picture."""
    picture = sprites[layer.sprite].float().div_(255)
    if layer.tinted is not None and layer.tints is not None:
        picture[layer.tinted, :3] = recolour(picture[layer.tinted, :3], layer.tints)
    picture[:, :3].mul_(picture[:, 3:])  # premultiplied, or transparent pixels bleed into the edges
    level = _level(picture.shape[-1], min(shape) * layer.typical_size)
    if level:
        picture = F.avg_pool2d(picture, 2**level)
    grid = _sampling_grid(layer, shape)
    placed = F.grid_sample(picture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return placed[:, :3], placed[:, 3:]


def _sampling_grid(layer: Layer, shape: tuple[int, int]) -> Tensor:
    """Where each pixel lies on the sprite, (N, H, W, 2).

    Written out because `F.affine_grid` is a matrix product, which TF32 or autocast would round to tenths of
    a pixel.
    """
    short = min(shape)
    across = _places(layer, 0, shape[1], short)[:, None, :].expand(-1, *shape)
    down = _places(layer, 1, shape[0], short)[:, :, None].expand(-1, *shape)
    if layer.pose is None:
        return torch.stack([across, down], dim=-1)
    turn, wide, high = (layer.pose[:, i].view(-1, 1, 1) for i in range(3))
    cos, sin = turn.cos(), turn.sin()
    return torch.stack([(across * cos + down * sin) / wide, (down * cos - across * sin) / high], dim=-1)


def _places(layer: Layer, axis: int, length: int, short: int) -> Tensor:
    """Coordinates (N, length) of the pixel centres along an axis, -1..1 over the sprite's side."""
    steps = torch.arange(length, device=layer.size.device, dtype=torch.float32)
    points = (steps * 2 + 1) / length - 1
    return (points[None] - layer.centre[:, axis, None]) * (length / short) / layer.size[:, None]


def _level(side: int, drawn: float) -> int:
    """Halvings after which bilinear sampling shrinks the sprite by at most about 1.4."""
    return max(0, min(round(math.log2(side / max(drawn, 1.0))), int(math.log2(side))))
