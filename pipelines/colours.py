"""Keeping a picture's colours while it is refined at ever larger sizes.

Every refining stage moves colours a little towards what the model draws on average at that size, and so does
the autoencoder; over several stages that adds up. Small versions of the picture before and after tell how the
colours were moved, as an affine map of RGB, and its inverse moves them back. (StableSR, arXiv 2305.07015,
section 3.3, matches channel statistics instead, which cannot tell colours apart that share a channel.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

_SIDE = 16  # pixels of the small versions that are compared
_RIDGE = 1e-3  # variance, of a range of 2; without colours to tell, the map is none
_MOST = 0.5  # of a colour, by which it moved; what moved colours further was no drift
_ROWS = 64  # converted at once


@dataclass(frozen=True)
class ColourMap:
    """``matrix @ (pixel - before) + after``, float64 on the CPU: ``(3, 3)``, ``(3,)``, ``(3,)``."""

    matrix: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor

    def apply_(self, picture: torch.Tensor) -> torch.Tensor:
        """Change ``(..., 3, H, W)`` in place, some rows at a time; returns it."""
        matrix, before, after = (
            t.to(picture.device, picture.dtype) for t in (self.matrix, self.before, self.after)
        )
        for top in range(0, picture.shape[-2], _ROWS):
            part = picture[..., top : top + _ROWS, :]
            moved = torch.einsum("ij,...jhw->...ihw", matrix, part - before[:, None, None])
            part.copy_(moved.add_(after[:, None, None]))
        return picture


def colour_map(now: torch.Tensor, wanted: torch.Tensor) -> ColourMap | None:
    """The map that gives a picture the colours of another one of the same scene.

    Args:
        now, wanted: ``(1, 3, h, w)`` in [-1, 1], of any sizes.

    Returns:
        None where the two differ by more than colours that drifted.
    """
    size = (_SIDE, _SIDE)
    a, b = (
        F.interpolate(t.float(), size=size, mode="area")[0].flatten(1).cpu().double() for t in (now, wanted)
    )
    before, after = a.mean(1), b.mean(1)
    a, b = a - before[:, None], b - after[:, None]
    ridge = _RIDGE * torch.eye(3, dtype=a.dtype)
    # How the wanted colours became the present ones; the other way round, noise would take contrast away.
    drift = (a @ b.T / a.shape[1] + ridge) @ torch.linalg.inv(b @ b.T / b.shape[1] + ridge)
    if not bool(torch.isfinite(drift).all()):
        return None  # the picture itself will be found wrong
    if torch.linalg.matrix_norm(drift - torch.eye(3, dtype=a.dtype), ord=2) > _MOST:
        logger.info("colours are left as they are: the refined picture is too far from the drawn one")
        return None
    return ColourMap(torch.linalg.inv(drift), before, after)
