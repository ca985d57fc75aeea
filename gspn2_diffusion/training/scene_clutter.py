"""Scenes without words, for the autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gspn2_diffusion.training.captions import BACKGROUNDS
from gspn2_diffusion.training.scenes import Layer, SceneBatch


def clutter(count: int, sprites: int, objects: int, seed: Sequence[int], single: float = 0.5) -> SceneBatch:
    """Varied scenes without words, for the autoencoder.

    Half the backgrounds are one colour, the others smooth blends; objects of all sizes anywhere, also cut
    off by the border; a share `single` of the scenes shows one large object in the middle.

    Args:
        count: scenes.
        sprites: rows of the sprite table.
        objects: layers of objects in the scenes that are not single.
        seed: decides everything.
    """
    rng = np.random.default_rng(list(seed))
    named = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255
    background = rng.random((count, 3, 3, 3), dtype=np.float32)
    flat = rng.random(count) < 0.5
    colours = named[rng.integers(len(named), size=count)] + rng.uniform(-0.04, 0.04, (count, 3))
    background[flat] = np.clip(colours, 0, 1)[flat][:, :, None, None]
    lone = round(count * single)
    layers = [_scatter(rng, 0, lone, sprites, (0.7, 1.0), 0.15)] if lone else []
    for large in (
        (True, False, False)[: max(1, objects)] if objects <= 3 else (True, *(False,) * (objects - 1))
    ):
        if lone < count:
            sizes = (0.6, 1.6) if large else (0.25, 0.6)
            layers.append(_scatter(rng, lone, count - lone, sprites, sizes, 0.9))
    return SceneBatch(torch.from_numpy(background), layers, [""] * count)


def _scatter(
    rng: np.random.Generator, first: int, count: int, sprites: int, sizes: tuple[float, float], spread: float
) -> Layer:
    size = rng.uniform(*sizes, size=count).astype(np.float32)
    centre = rng.uniform(-spread, spread, size=(count, 2)).astype(np.float32)
    index = torch.from_numpy(rng.integers(sprites, size=count))
    typical = float(np.sqrt(sizes[0] * sizes[1]))
    return Layer(first, index, torch.from_numpy(centre), torch.from_numpy(size), typical)
