"""What the tensor memory accelerator has to know of a tiled launch's operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.plans import MAX_BOX, Plan, ceil_div

Strides = tuple[int, ...]

# What a copy takes of a tile's lines: the halo, too, only its own positions, or those and one to either side.
# Stored are whole stages or single lines; between halos in shared memory (STORE_WIDE) always single ones.
HALO, OWN, AROUND, STORE, STORE_WIDE = range(5)


class Mapped(NamedTuple):
    """An operand that a tiled kernel copies through tensor maps."""

    pointer: int  # which of the launch's addresses
    kind: int  # HALO, OWN, AROUND, STORE or STORE_WIDE
    strides: Strides  # of B, H, W and, where it has one, D


def tensor_maps(
    plan: Plan,
    shape: Strides,
    dtype: torch.dtype,
    device: int,
    directions: int,
    mapped: Sequence[Mapped],
    pointers: tuple[int, ...],
) -> tuple[int, ...]:
    """Tensor maps of a tiled launch, for the vertical and the horizontal directions of each operand.

    Zeros where the GPU has no accelerator, for which the kernels copy in another way.

    Args:
        shape: ``(B, H, W, C)``.
        device: index of the CUDA device.
        directions: how many.
    """
    if not cupy_backend.has_accelerator(device):
        return (0,) * (32 * len(mapped))
    tile = plan.tile
    assert tile is not None
    batch, height, width, channels = shape
    words: list[int] = []
    for index, kind, (s_b, s_h, s_w, *s_d) in mapped:
        pointer = pointers[index]
        for across, (positions, s_p), (lines, s_l), own in (
            (False, (width, s_w), (height, s_h), plan.widths[0]),
            (True, (height, s_h), (width, s_w), plan.widths[1]),
        ):
            count = own + (2 * tile.halo if kind == HALO else 2 if kind == AROUND else 0)
            row, many, at_once, boxes = tile.slice, channels, _lines_at_once(kind, plan), plan.boxes
            if tile.merged and across:  # all lines of a stage in a row
                row, many, at_once, lines = row * tile.stage_lines, many * lines, 1, 1
            elif tile.merged and kind != AROUND:  # rows of 128 bytes
                n = 128 // (row * dtype.itemsize)
                row, many, positions, s_p = row * n, many * n, positions // n, s_p * n
                count, boxes = ceil_div(count, n), 1
            sizes = (many, positions, lines, directions if s_d else 1, batch)
            strides = [
                s if n > 1 else 16 for s, n in zip((s_p, s_l, *(s_d or [0]), s_b), sizes[1:], strict=True)
            ]
            box = (row, ceil_div(count, boxes), at_once, 1, 1)
            if pointer and 0 < box[1] <= MAX_BOX:
                words += cupy_backend.tensor_map(dtype, pointer, sizes, strides, box)
            else:
                words += [0] * 16
    return tuple(words)


def _lines_at_once(kind: int, plan: Plan) -> int:
    tile = plan.tile
    assert tile is not None
    parted = kind == STORE_WIDE and tile.halo > 0
    return 1 if kind in (STORE, STORE_WIDE) and (parted or not plan.whole) else tile.stage_lines
