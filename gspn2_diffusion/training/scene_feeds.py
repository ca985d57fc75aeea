"""Feeds of several picture shapes that take turns, step by step, alike on every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gspn2_diffusion.training.latents import LatentBatch, LatentFeed


def parse_shape(text: str, multiple: int = 16) -> tuple[int, int]:
    """ "192x320" -> (192, 320), height first.

    Raises:
        ValueError: it is no shape, or a side is no multiple of `multiple`.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) % multiple == 0 for part in parts):
        raise ValueError(f"`aspects` has {text!r}; write height x width, multiples of {multiple}: 192x320")
    return int(parts[0]), int(parts[1])


def schedule(shapes: int, share: float) -> list[int]:
    """Which feed trains in each step of a period: 0 the square one, 1.. the other shapes.

    Args:
        shapes: other shapes.
        share: of the steps that the other shapes get together.

    Raises:
        ValueError: `share` leaves no step for squares, or none for the shapes.
    """
    if not shapes:
        return [0]
    if not 0.0 < share < 1.0:
        raise ValueError(f"`aspect_share` is {share}; allowed: above 0 and below 1")
    period = max(shapes + 1, round(shapes / share))
    turns = [0] * period
    for number in range(shapes):
        turns[(number + 1) * period // shapes - 1] = number + 1
    return turns


def own_step(turns: Sequence[int], feed: int, step: int) -> int:
    """How many of the steps before `step` were the feed's."""
    whole, rest = divmod(step, len(turns))
    return whole * turns.count(feed) + list(turns[:rest]).count(feed)


class TurnFeed:
    """Several `LatentFeed`s behind the calls of one; which one a step uses follows from its number.

    Args:
        make: makes the feed of a shape, given its number, the step it continues at and its share.
        turns: see `schedule`.
        step: step that is trained next.
    """

    def __init__(
        self, make: Callable[[int, int, float], LatentFeed], turns: Sequence[int], step: int
    ) -> None:
        self._turns, self._step = list(turns), step
        self._feeds = [
            make(feed, own_step(turns, feed, step), self._turns.count(feed) / len(self._turns))
            for feed in range(max(self._turns) + 1)
        ]
        self._current = self._feeds[0]

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for captions."""
        return sum(feed.wait_seconds for feed in self._feeds)

    def advance(self) -> None:
        """Begin a step: its feed takes up new scenes."""
        self._current = self._feeds[self._turns[self._step % len(self._turns)]]
        self._current.advance()
        self._step += 1

    def draw(self, count: int, generator: torch.Generator) -> LatentBatch:
        """`count` random entries of the step's feed."""
        return self._current.draw(count, generator)

    def close(self) -> None:
        """End the threads."""
        for feed in self._feeds:
            feed.close()


def scene_feed(
    config: Any, encoder: Any, writer: Any, sprites: Any, *, seed: Sequence[int], step: int, refresh: int
) -> LatentFeed | TurnFeed:
    """The feed of a run: squares alone, or taking turns with the shapes of `config.aspects`.

    Args:
        config: settings of the run.
        encoder: makes latents.
        writer: makes square scenes.
        sprites: uint8 (S, 4, side, side) on the device.
        seed: (seed, rank, stream).
        step: step that is trained next.
        refresh: new scenes in a step.
    """
    shapes = [parse_shape(text) for text in config.aspects or []]

    def make(number: int, at: int, share: float) -> LatentFeed:
        capacity = max(int(config.bank_size * share), 2 * refresh)
        return LatentFeed(
            encoder,
            writer if number == 0 else writer.of_shape(shapes[number - 1]),
            sprites,
            seed=seed if number == 0 else (*seed, *shapes[number - 1]),
            step=at,
            capacity=capacity,
            refresh=refresh,
            initial=min(capacity, 4 * config.batch_size),
            depth=config.prefetch,
        )

    if not shapes:
        return make(0, step, 1.0)
    return TurnFeed(make, schedule(len(shapes), config.aspect_share), step)
