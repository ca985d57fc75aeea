"""Where things stand in a scene, and the words that say so."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Cell:
    """Room for one thing: centre in -1..1 over the picture, and its half-extents."""

    x: float
    y: float
    wide: float
    high: float


def row(count: int, y: float = 0.0, high: float = 1.0) -> tuple[Cell, ...]:
    """Equal cells from left to right."""
    wide = 1 / count
    return tuple(Cell(-1 + wide * (2 * i + 1), y, wide, high) for i in range(count))


def column(count: int) -> tuple[Cell, ...]:
    """Equal cells from top to bottom."""
    high = 1 / count
    return tuple(Cell(0.0, -1 + high * (2 * i + 1), 1.0, high) for i in range(count))


_ONE_ABOVE_TWO = (Cell(0.0, -0.5, 1.0, 0.5), *row(2, y=0.5, high=0.5))
_TWO_ABOVE_ONE = (*row(2, y=-0.5, high=0.5), Cell(0.0, 0.5, 1.0, 0.5))
_SQUARE = (*row(2, y=-0.5, high=0.5), *row(2, y=0.5, high=0.5))


@dataclass(frozen=True)
class Arrangement:
    """Cells for things and phrases that are true of them; {0}, {1}, ... name the things in cell order."""

    cells: tuple[Cell, ...]
    phrases: tuple[str, ...]
    weight: float = 1.0


PAIRS = (
    Arrangement(
        row(2),
        (
            "{0} to the left of {1}",
            "{1} to the right of {0}",
            "{0} left of {1}",
            "{1} right of {0}",
            "{0} on the left and {1} on the right",
            "{1} on the right and {0} on the left",
        ),
        0.45,
    ),
    Arrangement(row(2), ("{0} and {1}", "{0} next to {1}", "{1} next to {0}", "{0} beside {1}"), 0.17),
    Arrangement(
        column(2),
        (
            "{0} above {1}",
            "{1} below {0}",
            "{0} over {1}",
            "{1} under {0}",
            "{0} at the top and {1} at the bottom",
        ),
        0.38,
    ),
)
TRIPLES = (
    Arrangement(
        row(3),
        (
            "{0}, {1} and {2}",
            "{0}, {1} and {2} in a row",
            "{0} on the left, {1} in the middle and {2} on the right",
        ),
        0.45,
    ),
    Arrangement(column(3), ("{0} at the top, {1} in the middle and {2} at the bottom",), 0.15),
    Arrangement(_ONE_ABOVE_TWO, ("{0} above {1} and {2}", "{1} and {2} below {0}"), 0.2),
    Arrangement(_TWO_ABOVE_ONE, ("{0} and {1} above {2}", "{2} below {0} and {1}"), 0.2),
)
# The same thing several times; {0} is its plural with the number.
GROUPS: dict[int, tuple[Arrangement, ...]] = {
    2: (Arrangement(row(2), ("{0}",)),),
    3: (Arrangement(row(3), ("{0}", "{0} in a row"), 0.6), Arrangement(_ONE_ABOVE_TWO, ("{0}",), 0.4)),
    4: (Arrangement(_SQUARE, ("{0}",), 0.8), Arrangement(row(4), ("{0} in a row",), 0.2)),
}
CORNERS = (
    Arrangement((_SQUARE[0],), ("{0} in the top left corner",)),
    Arrangement((_SQUARE[1],), ("{0} in the top right corner",)),
    Arrangement((_SQUARE[2],), ("{0} in the bottom left corner",)),
    Arrangement((_SQUARE[3],), ("{0} in the bottom right corner",)),
    Arrangement((row(2)[0],), ("{0} on the left",)),
    Arrangement((row(2)[1],), ("{0} on the right",)),
    Arrangement((column(2)[0],), ("{0} at the top",)),
    Arrangement((column(2)[1],), ("{0} at the bottom",)),
)


def choose(rng: random.Random, arrangements: Sequence[Arrangement]) -> Arrangement:
    """One of them by weight."""
    return rng.choices(arrangements, [item.weight for item in arrangements])[0]


def place(
    rng: random.Random, cell: Cell, aspect: float = 1.0, fill: tuple[float, float] = (0.84, 1.0)
) -> tuple[float, float, float]:
    """Centre x, y and size (share of the shorter side) of a thing that stays in its cell.

    Args:
        rng: decides size and place.
        cell: the room.
        aspect: width over height of the picture.
        fill: range of the size over the largest that fits.
    """
    wide, high = cell.wide * max(aspect, 1.0), cell.high * max(1 / aspect, 1.0)  # in shorter sides
    room = min(wide, high)
    size = room * rng.uniform(*fill)
    # Things keep near the middle of long cells, or captions would say less about where they are.
    spare = [min(extent - size, 0.35 * room) for extent in (wide, high)]
    shift = [rng.uniform(-s, s) for s in spare]
    return cell.x + shift[0] * cell.wide / wide, cell.y + shift[1] * cell.high / high, size
