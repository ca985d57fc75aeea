"""The fixed prompts: made by code from the prepared records, the same for everyone with the same data."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gspn2_diffusion.training.captions import BACKGROUNDS
from gspn2_diffusion.training.emoji import DEFAULT_GROUPS, select
from gspn2_diffusion.training.emoji_captions import (
    coloured_phrase,
    counted_phrase,
    style_phrase,
    with_article,
)
from gspn2_diffusion.training.emoji_curation import curated
from gspn2_diffusion.training.scene_colours import OBJECT_COLOURS
from gspn2_diffusion.training.scene_layouts import COUNT_WORDS

if TYPE_CHECKING:
    from gspn2_diffusion.training.emoji import EmojiRecord

VERSION = 1  # raise it when any prompt changes: scores of different versions are not comparable

# Prompts of each group in the whole set.
SIZES = {
    "seen": 160,
    "unseen_pair": 120,
    "unseen_concept": 60,
    "pair": 120,
    "triple": 40,
    "count": 60,
    "colour": 60,
}
GROUPS = tuple(SIZES)
_FORM = "{o}, {s}, on {a} {b} background"
_ROW = ("{0} to the left of {1}", "{1} to the right of {0}", "{0} on the left and {1} on the right")
_COLUMN = ("{0} above {1}", "{1} below {0}")
_ROW3 = "{0} on the left, {1} in the middle and {2} on the right"
_COLUMN3 = "{0} at the top, {1} in the middle and {2} at the bottom"


@dataclass(frozen=True)
class AskedPrompt:
    """One prompt and what a picture of it must show.

    Attributes:
        prompt: the words.
        seed: of the picture.
        group: one of `GROUPS`.
        records: ids of the asked pictures, from left to right or top to bottom.
        concepts: their concepts.
        style: asked style.
        background: asked background, a key of `BACKGROUNDS`.
        layout: "single", "row", "column" or "group".
        count: things that must be seen.
        colour: asked colour of the thing, None where none is named.
    """

    prompt: str
    seed: int
    group: str
    records: tuple[str, ...]
    concepts: tuple[str, ...]
    style: str
    background: str
    layout: str = "single"
    count: int = 1
    colour: str | None = None


def evaluation_prompts(
    records: Sequence[EmojiRecord], sizes: dict[str, int] | None = None, limit: int | None = None
) -> list[AskedPrompt]:
    """The fixed prompts.

    Each group has its own random stream, so a `limit` takes the first prompts of each group and changes none.

    Args:
        records: every record of the prepared data.
        sizes: prompts per group; `SIZES` by default.
        limit: at most so many of each group.

    Raises:
        ValueError: an unknown group is asked for.
    """
    sizes = SIZES if sizes is None else sizes
    unknown = [group for group in sizes if group not in SIZES]
    if unknown:
        raise ValueError(f"`sizes` has unknown groups {unknown}; allowed: {', '.join(GROUPS)}")
    splits = {
        split: curated(select(records, split, DEFAULT_GROUPS))
        for split in ("train", "unseen_pair", "unseen_concept")
    }
    made: list[AskedPrompt] = []
    for group, size in sizes.items():
        pool = splits[group if group.startswith("unseen") else "train"]
        rng = random.Random(f"evaluation-{VERSION}-{group}")
        wanted = size if limit is None else min(size, limit)
        made += [_MAKERS[group](rng, pool, group, number) for number in range(size if pool else 0)][:wanted]
    return made


def fingerprint(prompts: Sequence[AskedPrompt]) -> str:
    """Short hash of the prompts, so that results say what they were measured on."""
    text = json.dumps([asdict(prompt) for prompt in prompts], sort_keys=True)
    return f"v{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _finish(
    rng: random.Random,
    words: str,
    group: str,
    number: int,
    chosen: Sequence[EmojiRecord],
    *,
    layout: str = "single",
    count: int = 1,
    colour: str | None = None,
) -> AskedPrompt:
    shades = [shade for shade in BACKGROUNDS if colour is None or shade.split()[-1] != colour]
    shade, style = rng.choice(shades), chosen[0].style
    article = "an" if shade == "orange" else "a"
    prompt = _FORM.format(o=words, s=style_phrase(style), a=article, b=shade)
    return AskedPrompt(
        prompt,
        seed=1000 * (GROUPS.index(group) + 1) + number,
        group=group,
        records=tuple(record.id for record in chosen),
        concepts=tuple(record.concept for record in chosen),
        style=style,
        background=shade,
        layout=layout,
        count=count,
        colour=colour,
    )


def _single(rng: random.Random, pool: Sequence[EmojiRecord], group: str, number: int) -> AskedPrompt:
    record = rng.choice(pool)
    return _finish(rng, with_article(record.name), group, number, [record])


def _company(rng: random.Random, pool: Sequence[EmojiRecord], count: int) -> list[EmojiRecord]:
    """Records of one style and different concepts."""
    chosen = [rng.choice(pool)]
    others = [record for record in pool if record.style == chosen[0].style]
    while len(chosen) < count:
        known = {record.concept for record in chosen}
        fresh = [record for record in others if record.concept not in known]
        chosen.append(rng.choice(fresh or others))
    return chosen


def _arranged(rng: random.Random, pool: Sequence[EmojiRecord], group: str, number: int) -> AskedPrompt:
    """Two or three things; rows and columns take turns."""
    count = 2 if group == "pair" else 3
    chosen = _company(rng, pool, count)
    layout = "row" if number % 2 == 0 else "column"
    forms: Sequence[str] = _ROW if layout == "row" else _COLUMN
    if count == 3:
        forms = (_ROW3 if layout == "row" else _COLUMN3,)
    words = rng.choice(forms).format(*(with_article(record.name) for record in chosen))
    return _finish(rng, words, group, number, chosen, layout=layout, count=count)


def _counted(rng: random.Random, pool: Sequence[EmojiRecord], group: str, number: int) -> AskedPrompt:
    count = 2 + number % 3
    for _ in range(200):
        record = rng.choice(pool)
        words = counted_phrase(record, COUNT_WORDS[count])
        if words is not None:
            return _finish(rng, words, group, number, [record], layout="group", count=count)
    raise ValueError("no record has a name that can be counted")


def _coloured(rng: random.Random, pool: Sequence[EmojiRecord], group: str, number: int) -> AskedPrompt:
    """A thing in a colour; animals, food, objects and vehicles, whose colour can be asked for sensibly."""
    fitting = [r for r in pool if r.group in ("animals-nature", "food-drink", "objects")] or list(pool)
    record, colour = rng.choice(fitting), rng.choice(list(OBJECT_COLOURS))
    return _finish(rng, coloured_phrase(record, colour), group, number, [record], colour=colour)


_Maker = Callable[[random.Random, Sequence["EmojiRecord"], str, int], AskedPrompt]
_MAKERS: dict[str, _Maker] = {
    "seen": _single,
    "unseen_pair": _single,
    "unseen_concept": _single,
    "pair": _arranged,
    "triple": _arranged,
    "count": _counted,
    "colour": _coloured,
}
