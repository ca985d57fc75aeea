"""Reading pictures: background, things in front of it, how many there are, and their colour."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusion.training.captions import BACKGROUNDS

_FOREGROUND = 0.10  # a pixel is drawn on when a channel (0..1) differs by more from the background
_COARSE = 64  # side at which connected parts are counted
_PART = 0.22  # parts of at least this share of the largest one count as things
_COLOUR_SHARE = 0.35  # of the drawn pixels that must have the asked colour, unless it is the most frequent


def to_lab(colour: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB in 0..1, channels last."""
    linear = torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=colour.dtype
    )
    white = torch.tensor([0.9505, 1.0, 1.089], dtype=colour.dtype)
    scaled = (linear @ matrix.T) / white
    cube = torch.where(scaled > 0.008856, scaled.clamp(min=1e-6) ** (1 / 3), 7.787 * scaled + 16 / 116)
    x, y, z = cube.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


_GROUNDS = to_lab(torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255)
# sRGB shades that people call by each of `OBJECT_COLOURS`; one shade each would call a deep blue purple.
_SHADES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((214, 40, 40), (180, 20, 30), (240, 75, 60)),
    "orange": ((250, 140, 40), (240, 115, 20)),
    "yellow": ((252, 220, 70), (255, 235, 125), (238, 192, 40)),
    "green": ((55, 170, 80), (125, 200, 80), (20, 110, 50)),
    "blue": ((55, 120, 220), (30, 60, 215), (125, 180, 245), (25, 50, 140)),
    "purple": ((130, 70, 180), (170, 120, 220), (95, 40, 130)),
    "pink": ((250, 145, 190), (235, 80, 150), (255, 190, 210)),
    "brown": ((128, 80, 48), (90, 55, 30), (165, 115, 75)),
    "black": ((20, 20, 24), (50, 50, 56)),
    "white": ((250, 250, 250), (230, 230, 233)),
    "gray": ((148, 148, 150), (108, 108, 112), (186, 186, 190)),
}
_SHADE_ROWS = to_lab(
    torch.tensor([rgb for row in _SHADES.values() for rgb in row], dtype=torch.float32) / 255
)
_SHADE_WORDS = torch.tensor([number for number, row in enumerate(_SHADES.values()) for _ in row])


def ground_colour(picture: Tensor) -> Tensor:
    """Colour of the background, (3,) in 0..1: the median along the border.

    Args:
        picture: (3, H, W) in 0..1.
    """
    ring = max(1, min(picture.shape[1:]) // 48)
    top, bottom = picture[:, :ring].flatten(1), picture[:, -ring:].flatten(1)
    left, right = picture[:, :, :ring].flatten(1), picture[:, :, -ring:].flatten(1)
    return torch.cat([top, bottom, left, right], dim=1).median(dim=1).values


def background_word(picture: Tensor) -> str:
    """The background whose colour is nearest (CIE76) to the picture's."""
    apart = (to_lab(ground_colour(picture)) - _GROUNDS).square().sum(dim=-1)
    return list(BACKGROUNDS)[int(apart.argmin())]


def foreground(picture: Tensor) -> Tensor:
    """Bool (H, W): where something is drawn on the background; specks are left out."""
    apart = (picture - ground_colour(picture)[:, None, None]).abs().amax(dim=0)
    drawn = (apart > _FOREGROUND).float()
    size = max(1, min(picture.shape[1:]) // 64) * 2 + 1
    share = F.avg_pool2d(drawn[None, None], size, 1, size // 2)[0, 0]
    return (share > 0.4) & (drawn > 0)


def box(mask: Tensor) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right), exclusive ends, of what a mask holds; None when it is empty."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def crop(picture: Tensor, mask: Tensor, side: int, margin: float = 0.13) -> Tensor:
    """What the mask holds, centred in a square of background.

    Args:
        picture: (3, H, W) in 0..1.
        mask: bool (H, W); an empty one gives the whole picture.
        side: of the result in pixels.
        margin: share of the thing's longer side that is left free around it.

    Returns:
        (3, side, side) in 0..1.
    """
    found = box(mask) or (0, picture.shape[1], 0, picture.shape[2])
    top, bottom, left, right = found
    long = max(bottom - top, right - left)
    half = max(4.0, long * (0.5 + margin))
    middle = ((top + bottom) / 2, (left + right) / 2)
    steps = (torch.arange(side) + 0.5) / side * 2 - 1
    rows = (middle[0] + steps * half) / picture.shape[1] * 2 - 1
    columns = (middle[1] + steps * half) / picture.shape[2] * 2 - 1
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1)
    ground = ground_colour(picture)[:, None, None]
    shrunk = max(1, int(2 * half / side))  # bilinear sampling alone would alias
    source = (picture - ground) * _reach(mask, found)
    source = F.avg_pool2d(source[None], shrunk) if shrunk > 1 else source[None]
    placed = F.grid_sample(source, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    return (placed + ground).clamp(0, 1)


def _reach(mask: Tensor, found: tuple[int, int, int, int]) -> Tensor:
    """1 inside the box, 0 outside, so that neighbours do not reach into the crop."""
    inside = torch.zeros_like(mask, dtype=torch.float32)
    inside[found[0] : found[1], found[2] : found[3]] = 1.0
    return inside


def parts(mask: Tensor, layout: str, count: int) -> list[Tensor]:
    """The mask cut into `count` masks, from left to right ("row") or top to bottom ("column").

    Cuts run where least is drawn, near the places that equal parts would have.
    """
    if layout not in ("row", "column"):
        return [mask]
    along = mask if layout == "row" else mask.T
    length = along.shape[1]
    filled = along.float().sum(dim=0)
    cuts = [0]
    for number in range(1, count):
        middle, reach = length * number / count, 0.4 * length / count
        low, high = max(cuts[-1] + 1, int(middle - reach)), int(middle + reach) + 1
        steps = torch.arange(low, high)
        # The fewest drawn pixels, and of equal ones that nearest to the middle.
        cost = filled[low:high] + (steps - middle).abs() / length
        cuts.append(int(steps[int(cost.argmin())]))
    cuts.append(length)
    pieces = []
    for start, end in itertools.pairwise(cuts):
        piece = torch.zeros_like(along)
        piece[:, start:end] = along[:, start:end]
        pieces.append(piece if layout == "row" else piece.T)
    return pieces


def count_things(mask: Tensor) -> int:
    """Connected parts of a mask, without those much smaller than the largest."""
    sizes = [len(part) for part in _connected(mask)]
    return sum(size >= _PART * max(sizes) for size in sizes)


def largest(mask: Tensor) -> Tensor:
    """The largest connected part of a mask; the mask itself when it is empty."""
    found = _connected(mask)
    if not found:
        return mask
    coarse = torch.zeros(_COARSE, _COARSE)
    rows, columns = zip(*max(found, key=len), strict=True)
    coarse[list(rows), list(columns)] = 1.0
    shape = (mask.shape[0], mask.shape[1])
    return (F.interpolate(coarse[None, None], size=shape, mode="nearest")[0, 0] > 0) & mask


def _connected(mask: Tensor) -> list[list[tuple[int, int]]]:
    """Parts on a coarse grid, where the finest gaps inside a thing close."""
    coarse = F.adaptive_avg_pool2d(mask.float()[None, None], _COARSE)[0, 0] > 0.15
    cells: np.ndarray = coarse.numpy().copy()
    found = []
    for start in zip(*np.nonzero(cells), strict=True):
        if not cells[start]:
            continue
        cells[start] = False
        part, waiting = [], deque([(int(start[0]), int(start[1]))])
        while waiting:
            row, column = waiting.popleft()
            part.append((row, column))
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= near[0] < _COARSE and 0 <= near[1] < _COARSE and cells[near]:
                    cells[near] = False
                    waiting.append(near)
        found.append(part)
    return found


def has_colour(picture: Tensor, mask: Tensor, colour: str) -> bool:
    """Whether the drawn pixels mainly have the named colour.

    Every drawn pixel votes for the word of the nearest shade; the asked word must be the most frequent or
    have a fair share (things have outlines, eyes and wheels).
    """
    pixels = picture[:, mask].T
    if not len(pixels):
        return False
    some = to_lab(pixels[:: max(1, len(pixels) // 4096)])
    votes = _SHADE_WORDS[torch.cdist(some, _SHADE_ROWS).argmin(dim=1)]
    shares = torch.bincount(votes, minlength=len(_SHADES)).float() / len(votes)
    asked = list(_SHADES).index(colour)
    return int(shares.argmax()) == asked or float(shares[asked]) >= _COLOUR_SHARE
