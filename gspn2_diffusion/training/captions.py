"""What scenes show and words that are true to it; plain Python, made ahead of time in a thread."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch

from gspn2_diffusion.training.emoji import object_phrase, style_phrase
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
# {p} stands left of or above {q}
_SIDE = (
    "{p} to the left of {q}",
    "{q} to the right of {p}",
    "{p} left of {q}",
    "{q} right of {p}",
    "{p} on the left and {q} on the right",
    "{q} on the right and {p} on the left",
)
_STACK = (
    "{p} above {q}",
    "{q} below {p}",
    "{p} over {q}",
    "{q} under {p}",
    "{p} at the top and {q} at the bottom",
)


@dataclass(frozen=True)
class SceneOptions:
    """How often scenes have two objects, and captions name style and background."""

    pair_probability: float = 0.15
    style_probability: float = 0.85
    background_probability: float = 0.75


class SceneWriter:
    """Draws scene descriptions with captions from records.

    Args:
        records: row i belongs to sprite i.
        options: frequencies.
        splits: the only splits that may occur.

    Raises:
        ValueError: no records, or one of another split.
    """

    def __init__(
        self, records: Sequence[EmojiRecord], options: SceneOptions, splits: Sequence[str] = ("train",)
    ) -> None:
        check_split(records, splits)
        self.records = records
        self.options = options
        self._by_style: dict[str, list[int]] = {}
        for index, record in enumerate(records):
            self._by_style.setdefault(record.style, []).append(index)

    def write(self, count: int, seed: Sequence[int]) -> SceneBatch:
        """`count` scenes decided by `seed`; the first ones, a fixed number, have two objects."""
        rng = random.Random(repr(tuple(seed)))
        pairs = round(count * self.options.pair_probability)
        paired = [self._pair(rng) for _ in range(pairs)]
        single = [self._single(rng) for _ in range(count - pairs)]
        scenes = [*paired, *single]
        background = torch.tensor([scene.colour for scene in scenes]).view(-1, 3, 1, 1)
        layers = []
        if paired:
            layers += [_layer(0, [s.objects[i] for s in paired], 0.46) for i in (0, 1)]
        if single:
            layers.append(_layer(pairs, [s.objects[0] for s in single], 0.84))
        return SceneBatch(background, layers, [scene.caption for scene in scenes])

    def _single(self, rng: random.Random) -> _Scene:
        index = rng.randrange(len(self.records))
        record = self.records[index]
        size = rng.uniform(0.72, 0.96)
        room = min(0.14, 1.0 - size + 0.04)
        spot = (rng.uniform(-room, room), rng.uniform(-room, room), size)
        return self._finished(rng, object_phrase(record, rng), record.style, [(index, *spot)])

    def _pair(self, rng: random.Random) -> _Scene:
        first = rng.randrange(len(self.records))
        style = self.records[first].style
        second = self._partner(rng, first)
        size = [rng.uniform(0.42, 0.5) for _ in range(2)]
        near, across = rng.uniform(0.46, 0.52), [rng.uniform(-0.25, 0.25) for _ in range(2)]
        side = rng.random() < 0.6
        spots = [(-near, across[0]), (near, across[1])]
        if not side:
            spots = [(y, x) for x, y in spots]
        words = [object_phrase(self.records[i], rng) for i in (first, second)]
        phrase = rng.choice(_SIDE if side else _STACK).format(p=words[0], q=words[1])
        objects = [(i, *spot, s) for i, spot, s in zip((first, second), spots, size, strict=True)]
        return self._finished(rng, phrase, style, objects)

    def _partner(self, rng: random.Random, first: int) -> int:
        """Another concept of the same style, when there is one."""
        record = self.records[first]
        choices = self._by_style[record.style]
        for _ in range(8):
            second = rng.choice(choices)
            if self.records[second].concept != record.concept:
                break
        return second

    def _finished(self, rng: random.Random, phrase: str, style: str, objects: list[Any]) -> _Scene:
        shade = rng.choice(_SHADES) if rng.random() < self.options.background_probability else None
        named = rng.random() < self.options.style_probability
        forms = (_BOTH if shade else _STYLE) if named else (_BACK if shade else _PLAIN)
        article = "an" if shade == "orange" else "a"
        form = rng.choice(forms)
        caption = form.format(o=phrase, s=style_phrase(style), b=shade, c=f"{article} {shade}")
        return _Scene(_coloured(rng, shade or "white"), objects, caption)


@dataclass
class _Scene:
    colour: tuple[float, float, float]
    objects: list[tuple[int, float, float, float]]
    caption: str


def _coloured(rng: random.Random, shade: str) -> tuple[float, float, float]:
    red, green, blue = BACKGROUNDS[shade]
    if shade == "white":
        return (1.0, 1.0, 1.0)
    jitter = [rng.uniform(-_JITTER, _JITTER) for _ in range(3)]
    values = [min(255.0, max(0.0, v + j)) / 255 for v, j in zip((red, green, blue), jitter, strict=True)]
    return (values[0], values[1], values[2])


def _layer(first: int, objects: list[tuple[int, float, float, float]], typical: float) -> Layer:
    table = np.array(objects, dtype=np.float32)
    sprite = torch.tensor([item[0] for item in objects])
    return Layer(
        first, sprite, torch.from_numpy(table[:, 1:3].copy()), torch.from_numpy(table[:, 3].copy()), typical
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


Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """Makes items first, first + 1, ... in a thread, so that Python work never stalls the device.

    Args:
        make: called with the number of the item.
        first: number of the first item.
        depth: items kept ready.
    """

    def __init__(self, make: Callable[[int], Made], first: int = 0, depth: int = 16) -> None:
        self.wait_seconds = 0.0
        self._queue: queue.Queue[Made | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Made], number: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Made | BaseException = make(number)
            except Exception as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            number += 1

    def get(self) -> Made:
        """The next item; an error in the thread is raised here."""
        started = time.monotonic()
        item = self._queue.get()
        self.wait_seconds += time.monotonic() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(timeout=5)
