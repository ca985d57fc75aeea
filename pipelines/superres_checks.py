"""Checks of :class:`GSPN2SuperResPipeline`'s own arguments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from gspn2_diffusion.pipelines import input_checks


def check_strength(strength: Any, stages: int) -> list[float]:
    """One strength per refining stage.

    Raises:
        TypeError, ValueError: not numbers in [0, 1], or a list of another length.
    """
    if not isinstance(strength, (list, tuple)):
        input_checks.check_fraction("strength", strength)
        return [float(strength)] * stages
    for index, value in enumerate(strength):
        input_checks.check_fraction(f"strength[{index}]", value)
    if len(strength) != stages:
        raise ValueError(
            f"`strength` as a list must have one number per refining stage: {stages}, got {len(strength)}"
        )
    return [float(value) for value in strength]


def check_sizes(sizes: Any, height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """Height and width of every stage, the last rounded up to ``multiple``.

    Raises:
        TypeError, ValueError: not pairs of multiples of ``multiple``, shrinking, or another end.
    """
    if not isinstance(sizes, Sequence) or not all(
        isinstance(size, (list, tuple)) and len(size) == 2 for size in sizes
    ):
        raise TypeError(f"`sizes` must be a list of (height, width), got {sizes!r}")
    if not sizes or tuple(sizes[-1]) != (height, width):
        raise ValueError(f"`sizes` must end with `height` and `width`, ({height}, {width}), got {sizes!r}")
    last = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    stages = [(int(size[0]), int(size[1])) for size in sizes[:-1]] + [last]
    for index, (size, following) in enumerate(itertools.pairwise(stages)):
        for name, length in zip(("height", "width"), size, strict=True):
            input_checks.check_size(f"sizes[{index}].{name}", length, multiple)
        if size[0] > following[0] or size[1] > following[1]:
            raise ValueError(f"`sizes` must grow, got {size} before {following}")
    return stages
