"""What scenes show and words that are true to it; plain Python, made ahead of time in a thread."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gspn2_diffusion.training.emoji import object_phrase, style_phrase
from gspn2_diffusion.training.emoji_captions import coloured_phrase, counted_phrase
from gspn2_diffusion.training.emoji_curation import is_lettered
from gspn2_diffusion.training.scene_colours import OBJECT_COLOURS, MainColour, shade, tint
from gspn2_diffusion.training.scene_layouts import (
    CORNERS,
    COUNT_WORDS,
    GROUPS,
    PAIRS,
    TRIPLES,
    Arrangement,
    choose,
    place,
)
from gspn2_diffusion.training.scenes import Layer, SceneBatch

if TYPE_CHECKING:
    from gspn2_diffusion.training.emoji import EmojiRecord

# sRGB bytes
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (252, 220, 60),
    "green": (56, 160, 70),
    "light green": (170, 226, 160),
    "teal": (20, 140, 140),
    "blue": (40, 90, 220),
    "light blue": (160, 212, 245),
    "navy": (20, 30, 90),
    "purple": (125, 60, 180),
    "pink": (250, 160, 195),
    "brown": (120, 75, 40),
    "beige": (238, 222, 190),
}
_SHADES = tuple(BACKGROUNDS)
_OBJECT_COLOURS = tuple(OBJECT_COLOURS)
_JITTER = 10.0  # of a background's bytes, uniform; white stays white, as captions without colour promise it

_PLAIN = ("{o}",)
_STYLE = ("{o}, {s}", "{o}, {s}", "{o} in {s}", "{s}, {o}", "{s} {o}")
_BACK = ("{o} on {c} background", "{o}, on {c} background", "{o}, {b} background")
_BOTH = (
    "{o}, {s}, on {c} background",
    "{o}, {s}, on {c} background",
    "{o}, {s}, on {c} background",
    "{o} on {c} background, {s}",
    "{o} in {s} on {c} background",
    "{s} {o} on {c} background",
    "{o}, {s}, {b} background",
)


@dataclass(frozen=True)
class SceneOptions:
    """How often scenes are of each kind, and what their captions name.

    What the shares of pairs, triples, groups (one thing two to four times) and corners leave over shows one
    large thing. `colour_probability` is the share of recolourable things that get another colour, named in
    the caption; `natural_probability` the share of the others whose own colour is named.
    """

    pair_probability: float = 0.15
    style_probability: float = 0.85
    background_probability: float = 0.75
    triple_probability: float = 0.0
    group_probability: float = 0.0
    corner_probability: float = 0.0
    colour_probability: float = 0.0
    natural_probability: float = 0.0
    mirror_probability: float = 0.0
    wobble: float = 0.0  # largest turn in radians; widths, heights and colours vary along with it


@dataclass
class _Thing:
    sprite: int
    x: float
    y: float
    size: float
    pose: tuple[float, float, float]
    tint: list[float] | None
    colour: str | None = None  # that the caption names and the data does not have


@dataclass
class _Scene:
    colour: tuple[float, float, float]
    things: list[_Thing]
    caption: str
    large: bool
    names: list[str]  # the words for each of the things; empty where one phrase names them all


@dataclass(frozen=True)
class PlacedCaption:
    """A caption and its things: words, centre x and y in -1..1 over the picture, size as in `Layer`."""

    caption: str
    things: list[tuple[str, float, float, float]]


class SceneWriter:
    """Draws scene descriptions with captions from records.

    Args:
        records: row i belongs to sprite i.
        options: frequencies.
        splits: the only splits that may occur.
        colours: main colour of each sprite; without them nothing is recoloured.
        aspect: width over height of the pictures.

    Raises:
        ValueError: no records, one of another split, or `colours` of another length.
    """

    def __init__(
        self,
        records: Sequence[EmojiRecord],
        options: SceneOptions,
        splits: Sequence[str] = ("train",),
        colours: Sequence[MainColour] | None = None,
        aspect: float = 1.0,
    ) -> None:
        check_split(records, splits)
        if colours is not None and len(colours) != len(records):
            raise ValueError(f"`colours` has {len(colours)} entries for {len(records)} records")
        self.records = records
        self.options = options
        self.aspect = aspect
        self.shape: tuple[int, int] | None = None
        self._colours = colours
        self._by_style: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            self._by_style.setdefault(record.style, []).append(index)
        self._mirrored = [not is_lettered(record) for record in records]
        options_ = self.options
        self._kinds = (self._pair, self._triple, self._group, self._corner, self._single)
        shares = (
            options_.pair_probability,
            options_.triple_probability,
            options_.group_probability,
            options_.corner_probability,
        )
        self._shares = (*shares, max(0.0, 1.0 - sum(shares)))

    def write(self, count: int, seed: Sequence[int]) -> SceneBatch:
        """`count` scenes decided by `seed`; those with most things come first."""
        scenes = self._scenes(count, seed)
        scenes.sort(key=lambda scene: -1 if scene.large else -len(scene.things) - 1)
        small = sum(not scene.large for scene in scenes)
        layers = []
        for number in range(max((len(scene.things) for scene in scenes[:small]), default=0)):
            things = [scene.things[number] for scene in scenes[:small] if len(scene.things) > number]
            layers.append(_layer(0, things, 0.42))
        if small < count:
            layers.append(_layer(small, [scene.things[0] for scene in scenes[small:]], 0.84))
        background = torch.tensor([scene.colour for scene in scenes]).view(-1, 3, 1, 1)
        return SceneBatch(background, layers, [scene.caption for scene in scenes], self.shape)

    def places(self, count: int, seed: Sequence[int]) -> list[PlacedCaption]:
        """Captions of `count` scenes, with the place of everything that has words of its own."""
        return [
            PlacedCaption(
                scene.caption,
                [(words, t.x, t.y, t.size) for words, t in zip(scene.names, scene.things, strict=False)],
            )
            for scene in self._scenes(count, seed)
        ]

    def _scenes(self, count: int, seed: Sequence[int]) -> list[_Scene]:
        rng = random.Random(repr(tuple(seed)))
        return [write(rng) for write in rng.choices(self._kinds, self._shares, k=count)]

    def of_shape(self, shape: tuple[int, int]) -> SceneWriter:
        """The same writer for pictures of (height, width) pixels."""
        other = copy.copy(self)
        other.shape, other.aspect = shape, shape[1] / shape[0]
        # bound methods of the copy, or scenes would be laid out for the old shape
        other._kinds = (other._pair, other._triple, other._group, other._corner, other._single)
        return other

    def _single(self, rng: random.Random) -> _Scene:
        index = rng.randrange(len(self.records))
        size = rng.uniform(0.72, 0.96)
        room = min(0.14, 1.0 - size + 0.04)
        cell = (rng.uniform(-room, room), rng.uniform(-room, room), size)
        phrase, thing = self._thing(rng, index, cell)
        return self._finished(rng, phrase, [index], [thing], [phrase], large=True)

    def _corner(self, rng: random.Random) -> _Scene:
        return self._arranged(rng, choose(rng, CORNERS), [rng.randrange(len(self.records))])

    def _pair(self, rng: random.Random) -> _Scene:
        return self._arranged(rng, choose(rng, PAIRS), self._company(rng, 2))

    def _triple(self, rng: random.Random) -> _Scene:
        return self._arranged(rng, choose(rng, TRIPLES), self._company(rng, 3))

    def _group(self, rng: random.Random) -> _Scene:
        """The same picture several times, for counting."""
        number = rng.choices((2, 3, 4), (0.4, 0.35, 0.25))[0]
        for _ in range(16):
            index = rng.randrange(len(self.records))
            colour = self._wanted_colour(rng, index)
            phrase = counted_phrase(self.records[index], COUNT_WORDS[number], colour)
            if phrase is not None:
                break
        else:
            return self._single(rng)
        arrangement = choose(rng, GROUPS[number])
        numbers = tint(self._main(index), colour) if colour else None
        pose = self._pose(rng, index)
        things = [
            _Thing(index, *place(rng, cell, self.aspect, (0.86, 0.94)), pose, numbers, colour)
            for cell in arrangement.cells
        ]
        words = rng.choice(arrangement.phrases).format(phrase)
        return self._finished(rng, words, [index], things, [], large=False)

    def _company(self, rng: random.Random, count: int) -> list[int]:
        """Pictures of one style and, when there are such, of different concepts."""
        chosen = [rng.randrange(len(self.records))]
        choices = self._by_style[self.records[chosen[0]].style]
        while len(chosen) < count:
            known = {self.records[index].concept for index in chosen}
            for _ in range(8):
                other = rng.choice(choices)
                if self.records[other].concept not in known:
                    break
            chosen.append(other)
        return chosen

    def _arranged(self, rng: random.Random, arrangement: Arrangement, chosen: list[int]) -> _Scene:
        spots = [place(rng, cell, self.aspect) for cell in arrangement.cells]
        made = [self._thing(rng, index, spot) for index, spot in zip(chosen, spots, strict=True)]
        names, things = [words for words, _ in made], [thing for _, thing in made]
        phrase = rng.choice(arrangement.phrases).format(*names)
        return self._finished(rng, phrase, chosen, things, names, large=False)

    def _thing(self, rng: random.Random, index: int, spot: tuple[float, float, float]) -> tuple[str, _Thing]:
        """Words for a picture and the thing itself, recoloured or not."""
        record, colour = self.records[index], self._wanted_colour(rng, index)
        pose = self._pose(rng, index)
        if colour is not None:
            numbers = tint(self._main(index), colour)
            return coloured_phrase(record, colour), _Thing(index, *spot, pose, numbers, colour)
        natural = self._main(index).name if self._colours is not None else None
        if natural is not None and rng.random() < self.options.natural_probability:
            words = coloured_phrase(record, natural)
        else:
            words = object_phrase(record, rng)
        return words, _Thing(index, *spot, pose, self._shaded(rng))

    def _main(self, index: int) -> MainColour:
        return self._colours[index] if self._colours is not None else MainColour(0, 0, 0, 0, 0)

    def _wanted_colour(self, rng: random.Random, index: int) -> str | None:
        if rng.random() >= self.options.colour_probability or self._main(index).kind == 0:
            return None
        return rng.choice(_OBJECT_COLOURS)

    def _pose(self, rng: random.Random, index: int) -> tuple[float, float, float]:
        wobble = self.options.wobble
        mirrored = self._mirrored[index] and rng.random() < self.options.mirror_probability
        wide, high = (1 + rng.uniform(-0.4, 0.4) * wobble for _ in range(2))
        return rng.uniform(-wobble, wobble), -wide if mirrored else wide, high

    def _shaded(self, rng: random.Random) -> list[float] | None:
        """A small change of all colours for half of the things."""
        wobble = self.options.wobble
        if not wobble or rng.random() < 0.5:
            return None
        return shade(
            rng.uniform(-0.1, 0.1) * wobble, 1 + rng.uniform(-1, 1) * wobble, 1 - rng.random() * wobble / 2
        )

    def _finished(
        self,
        rng: random.Random,
        phrase: str,
        chosen: list[int],
        things: list[_Thing],
        names: list[str],
        *,
        large: bool,
    ) -> _Scene:
        """The scene on its background, with the whole caption."""
        named_back = rng.random() < self.options.background_probability
        taken = {thing.colour for thing in things} - {None}
        ground = rng.choice(_free_shades(taken)) if named_back else None
        named = rng.random() < self.options.style_probability
        forms = (_BOTH if ground else _STYLE) if named else (_BACK if ground else _PLAIN)
        article = "an" if ground == "orange" else "a"
        style = style_phrase(self.records[chosen[0]].style)
        caption = rng.choice(forms).format(o=phrase, s=style, b=ground, c=f"{article} {ground}")
        return _Scene(_coloured(rng, ground or "white"), things, caption, large, names)


def _free_shades(taken: set[str | None]) -> Sequence[str]:
    """Backgrounds on which things of the taken colours show."""
    return [shade for shade in _SHADES if shade.split()[-1] not in taken] if taken else _SHADES


def _coloured(rng: random.Random, shade: str) -> tuple[float, float, float]:
    red, green, blue = BACKGROUNDS[shade]
    if shade == "white":
        return (1.0, 1.0, 1.0)
    jitter = [rng.uniform(-_JITTER, _JITTER) for _ in range(3)]
    values = [min(255.0, max(0.0, v + j)) / 255 for v, j in zip((red, green, blue), jitter, strict=True)]
    return (values[0], values[1], values[2])


def _layer(first: int, things: list[_Thing], typical: float) -> Layer:
    table = np.array([(t.x, t.y, t.size, *t.pose) for t in things], dtype=np.float32)
    tinted = [row for row, thing in enumerate(things) if thing.tint is not None]
    tints = [thing.tint for thing in things if thing.tint is not None]
    posed = bool((table[:, 3:] != (0.0, 1.0, 1.0)).any())
    return Layer(
        first,
        torch.tensor([thing.sprite for thing in things]),
        torch.from_numpy(table[:, :2].copy()),
        torch.from_numpy(table[:, 2].copy()),
        typical,
        pose=torch.from_numpy(table[:, 3:].copy()) if posed else None,
        tinted=torch.tensor(tinted) if tinted else None,
        tints=torch.tensor(tints, dtype=torch.float32) if tinted else None,
    )


def check_split(records: Sequence[EmojiRecord], splits: Sequence[str]) -> None:
    """Held-out pictures never enter training.

    Raises:
        ValueError: there are no records, or one of another split.
    """
    if not records:
        raise ValueError("`records` is empty")
    for record in records:
        if record.split not in splits:
            raise ValueError(f"record {record.id} is of split {record.split!r}; allowed: {', '.join(splits)}")
