"""Colours of things: what colour a sprite mainly has, and the same sprite in another colour."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Hue (turns), saturation, value of the colours that things can be asked for in.
OBJECT_COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.0, 0.82, 0.88),
    "orange": (0.075, 0.85, 0.98),
    "yellow": (0.14, 0.75, 0.98),
    "green": (0.36, 0.68, 0.66),
    "blue": (0.60, 0.76, 0.86),
    "purple": (0.77, 0.62, 0.72),
    "pink": (0.935, 0.42, 0.98),
    "brown": (0.065, 0.62, 0.50),
    "black": (0.6, 0.06, 0.15),
    "white": (0.6, 0.02, 0.97),
    "gray": (0.6, 0.03, 0.58),
}
TINT_WIDTH = 6  # numbers that describe one recolouring, see `tint`

_PROBE = 32  # side at which sprites are looked at
_BINS = 36
_REACH = 3  # bins on either side that belong to a hue: 30 degrees
_CHROMATIC, _LIGHT = 1.0, 2.0
_INNER, _OUTER = 0.10, 0.17  # turns from the main hue: fully recoloured, not at all


@dataclass(frozen=True)
class MainColour:
    """What a sprite mainly shows.

    Attributes:
        kind: 1 one hue, 2 white or light gray, 0 no main colour.
        hue, saturation, value: mean over the pixels of the main colour, 0..1.
        share: of the drawn pixels.
    """

    kind: float
    hue: float
    saturation: float
    value: float
    share: float

    @property
    def name(self) -> str | None:
        """The plain word for it, where one is certain."""
        if self.kind == _LIGHT:
            return "white" if self.value > 0.85 and self.share > 0.7 else None
        if self.kind != _CHROMATIC or self.share < 0.6:
            return None
        return _word(self.hue, self.saturation, self.value)


def _word(hue: float, saturation: float, value: float) -> str | None:
    if 0.02 <= hue <= 0.11 and value < 0.62:
        return "brown"
    if (hue > 0.86 and saturation < 0.6 and value > 0.8) or (0.88 < hue < 0.95 and value > 0.8):
        return "pink"
    if value < 0.4 or (saturation < 0.45 and not 0.24 <= hue <= 0.69):
        return None
    spans = {
        "orange": (0.055, 0.10),
        "yellow": (0.125, 0.175),
        "green": (0.24, 0.45),
        "blue": (0.53, 0.69),
        "purple": (0.71, 0.84),
    }
    found = [word for word, (low, high) in spans.items() if low <= hue <= high]
    if hue <= 0.03 or hue >= 0.965:
        found = ["red"]
    if found in (["orange"], ["yellow"]) and value < 0.7:
        return None
    return found[0] if found else None


def to_hsv(colour: Tensor) -> Tensor:
    """(N, 3, H, W) RGB in 0..1 to hue (turns), saturation and value, same shape."""
    high, low = colour.amax(dim=1), colour.amin(dim=1)
    chroma = (high - low).clamp(min=1e-6)
    red, green, blue = colour.unbind(1)
    hue = torch.where(high == red, (green - blue) / chroma, (red - green) / chroma + 4)
    hue = torch.where((high == green) & (high != red), (blue - red) / chroma + 2, hue)
    return torch.stack([(hue / 6) % 1.0, (high - low) / high.clamp(min=1e-6), high], dim=1)


def from_hsv(found: Tensor) -> Tensor:
    """`to_hsv` undone."""
    hue, saturation, value = found.unbind(1)
    offset = torch.tensor([5.0, 3.0, 1.0], device=found.device).view(1, 3, 1, 1)
    k = (offset + hue.unsqueeze(1) * 6) % 6
    amount = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(1) * (1 - saturation.unsqueeze(1) * amount)


@torch.no_grad()
def main_colours(sprites: Tensor, chunk: int = 256) -> list[MainColour]:
    """Main colour of each sprite.

    Args:
        sprites: uint8 (S, 4, side, side), straight alpha, on any device.
        chunk: sprites looked at together.
    """
    rows = [_look(sprites[start : start + chunk]) for start in range(0, len(sprites), chunk)]
    table = torch.cat(rows).cpu().tolist() if rows else []
    return [MainColour(*row) for row in table]


def _look(sprites: Tensor) -> Tensor:
    """(N, 5): kind, hue, saturation, value, share."""
    picture = sprites.float().div_(255)
    colour, alpha = picture[:, :3] * picture[:, 3:], picture[:, 3:]
    side = min(_PROBE, picture.shape[-1])
    colour, alpha = F.adaptive_avg_pool2d(colour, side), F.adaptive_avg_pool2d(alpha, side)
    hue, saturation, value = to_hsv((colour / alpha.clamp(min=1e-4)).clamp(0, 1)).unbind(1)
    drawn = (alpha[:, 0] > 0.9).float()
    total = drawn.sum(dim=(1, 2)).clamp(min=1.0)
    vivid = drawn * (saturation > 0.22) * (value > 0.18)
    bins = (hue * _BINS).long() % _BINS
    counts = torch.zeros(len(sprites), _BINS, device=sprites.device)
    counts.scatter_add_(1, bins.flatten(1), vivid.flatten(1))
    around = torch.stack([counts.roll(shift, dims=1) for shift in range(-_REACH, _REACH + 1)]).sum(dim=0)
    centre = (around.argmax(dim=1) + 0.5) / _BINS
    near = vivid * (distance(hue, centre.view(-1, 1, 1)) <= (_REACH + 0.5) / _BINS)
    light = drawn * (saturation < 0.18) * (value > 0.55)
    share_hue, share_light = near.sum(dim=(1, 2)) / total, light.sum(dim=(1, 2)) / total
    is_hue = (share_hue >= 0.45) & (share_hue > share_light)
    is_light = ~is_hue & (share_light >= 0.55)
    weight = torch.where(is_light.view(-1, 1, 1), light, near)
    amount = weight.sum(dim=(1, 2)).clamp(min=1.0)
    angle = hue * (2 * math.pi)
    mean_hue = torch.atan2((weight * angle.sin()).sum((1, 2)), (weight * angle.cos()).sum((1, 2)))
    kind = torch.where(is_hue, _CHROMATIC, torch.where(is_light, _LIGHT, 0.0))
    mean_saturation, mean_value = ((weight * x).sum((1, 2)) / amount for x in (saturation, value))
    share = torch.where(is_light, share_light, share_hue)
    return torch.stack([kind, (mean_hue / (2 * math.pi)) % 1.0, mean_saturation, mean_value, share], dim=1)


def distance(hue: Tensor, other: Tensor) -> Tensor:
    """Turns between two hues, 0..0.5."""
    apart = (hue - other).abs() % 1.0
    return torch.minimum(apart, 1 - apart)


def tint(main: MainColour, colour: str) -> list[float]:
    """Numbers for `recolour` that turn the main colour into the named one.

    Raises:
        ValueError: the sprite has no main colour, or the colour is unknown.
    """
    if main.kind == 0.0:
        raise ValueError("`main` has no main colour; such a sprite cannot be recoloured")
    if colour not in OBJECT_COLOURS:
        raise ValueError(f"`colour` is {colour!r}; allowed: {', '.join(OBJECT_COLOURS)}")
    hue, saturation, value = OBJECT_COLOURS[colour]
    factor = saturation / max(main.saturation, 0.05) if main.kind == _CHROMATIC else saturation
    return [main.kind, main.hue, hue, factor, main.value, value]


def shade(hue: float, saturation: float, value: float) -> list[float]:
    """Numbers for `recolour` that shift every pixel a little: hue in turns, factors of the others."""
    return [0.0, 0.0, hue, saturation, 0.5, 0.5 * value]


def recolour(colour: Tensor, tints: Tensor) -> Tensor:
    """Turn the main colour of pictures into another one; shading, other hues and outlines stay.

    Args:
        colour: (N, 3, H, W) straight RGB in 0..1.
        tints: (N, 6) from `tint` or `shade`.

    Returns:
        (N, 3, H, W).
    """
    kind, source, target, factor, old, new = (tints[:, i].view(-1, 1, 1) for i in range(6))
    hue, saturation, value = to_hsv(colour).unbind(1)
    away = (hue - source + 0.5) % 1.0 - 0.5
    near = ((_OUTER - away.abs()) / (_OUTER - _INNER)).clamp(0, 1) * (saturation * 5).clamp(0, 1)
    pale = ((0.35 - saturation) / 0.2).clamp(0, 1) * ((value - 0.3) / 0.2).clamp(0, 1)
    chosen = torch.where(kind == _CHROMATIC, near, torch.where(kind == _LIGHT, pale, torch.ones_like(near)))
    moved = torch.where(kind == 0.0, hue + target, target + torch.where(kind == _CHROMATIC, 0.4 * away, 0.0))
    strength = torch.where(kind == _LIGHT, factor.expand_as(saturation), (saturation * factor).clamp(0, 1))
    darker = value * (new / old.clamp(min=1e-3))
    lighter = 1 - (1 - value) * ((1 - new) / (1 - old).clamp(min=1e-3))
    level = torch.where(new < old, darker, lighter).clamp(0, 1)
    changed = from_hsv(torch.stack([moved % 1.0, strength, level], dim=1))
    chosen = chosen.unsqueeze(1)
    return colour * (1 - chosen) + changed * chosen
