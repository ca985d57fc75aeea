"""The prepared emoji pictures: records, selection, and the public names of the data side of training.

``scripts/prepare_emoji.py`` writes the folder (or the one-file archive) that `load_records` reads. Turning
records into pixels is in `emoji_raster`, turning them into words in `emoji_captions`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspn2_diffusion.training.emoji_captions import STYLE_WORDS, object_phrase, style_phrase
from gspn2_diffusion.training.emoji_raster import EmojiPictureError, load_sprites, rasterize
from gspn2_diffusion.training.emoji_splits import SPLITS, STYLES, style_family

__all__ = [
    "DEFAULT_GROUPS",
    "GROUPS",
    "SPLITS",
    "STYLES",
    "STYLE_WORDS",
    "EmojiPictureError",
    "EmojiRecord",
    "load_records",
    "load_sprites",
    "object_phrase",
    "rasterize",
    "select",
    "style_family",
    "style_phrase",
]

# Groups of drawn things that a small model learns well; the other two are people and pictograms.
DEFAULT_GROUPS = (
    "animals-nature",
    "food-drink",
    "objects",
    "travel-places",
    "activities",
    "smileys-emotion",
)
GROUPS = (*DEFAULT_GROUPS, "people-body", "symbols")


@dataclass(frozen=True)
class EmojiRecord:
    """One picture of one thing in one style.

    Attributes:
        id: unique key, ``"<style>/<file stem>"``.
        style: one of `STYLES`.
        concept: cluster key shared by every variant of the drawn thing; splits are decided on it.
        name: short caption words, lower case, without article ("red apple").
        aliases: other caption words for the same thing, most usual first.
        tags: single words around the thing; not captions by themselves.
        group: one of `GROUPS`.
        split: one of `SPLITS`.
        file: path relative to the data folder.
        path: absolute path of the picture (``.svg`` or ``.webp``).
    """

    id: str
    style: str
    concept: str
    name: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    split: str
    file: str
    path: Path = field(compare=False)


def load_records(source: str | Path) -> list[EmojiRecord]:
    """Read every record of a prepared folder or of its ``.tar.xz`` archive, in file order.

    An archive is unpacked once, beside itself (or in the temporary folder when that is read-only).

    Raises:
        FileNotFoundError: `source` or its ``records.jsonl`` does not exist.
        ValueError: a line of ``records.jsonl`` is damaged or holds an unknown style, group or split.
    """
    root = Path(source)
    if not root.exists():
        raise FileNotFoundError(f"emoji data not found: {root}; scripts/prepare_emoji.py makes it")
    if root.is_file():
        root = _unpacked(root)
    listing = root / "records.jsonl"
    if not listing.is_file():
        raise FileNotFoundError(f"{listing} is missing; {root} is not a folder of prepared emoji")
    lines = listing.read_text(encoding="utf-8").splitlines()
    return [_parse(line, number, listing) for number, line in enumerate(lines, start=1)]


def select(
    records: Iterable[EmojiRecord],
    split: str | Sequence[str] | None = "train",
    groups: Sequence[str] | None = DEFAULT_GROUPS,
    styles: Sequence[str] | None = None,
) -> list[EmojiRecord]:
    """Records of the wanted split(s), groups and styles, in order; None takes all of a kind.

    Raises:
        ValueError: an unknown split, group or style is asked for.
    """
    wanted = {
        "split": _checked("split", [split] if isinstance(split, str) else split, SPLITS),
        "group": _checked("groups", groups, GROUPS),
        "style": _checked("styles", styles, STYLES),
    }
    return [
        record
        for record in records
        if all(allowed is None or getattr(record, name) in allowed for name, allowed in wanted.items())
    ]


def _checked(argument: str, values: Sequence[str] | None, allowed: Sequence[str]) -> set[str] | None:
    if values is None:
        return None
    unknown = [value for value in values if value not in allowed]
    if unknown:
        raise ValueError(f"`{argument}` has unknown {unknown}; allowed: {', '.join(allowed)}")
    return set(values)


def _parse(line: str, number: int, listing: Path) -> EmojiRecord:
    try:
        raw: dict[str, Any] = json.loads(line)
        record = EmojiRecord(
            id=raw["id"],
            style=raw["style"],
            concept=raw["concept"],
            name=raw["name"],
            aliases=tuple(raw["aliases"]),
            tags=tuple(raw["tags"]),
            group=raw["group"],
            split=raw["split"],
            file=raw["file"],
            path=_inside(listing.parent, raw["file"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{listing}, line {number}: damaged record ({error!r})") from error
    for name, allowed in (("style", STYLES), ("group", GROUPS), ("split", SPLITS)):
        if getattr(record, name) not in allowed:
            raise ValueError(
                f"{listing}, line {number}: {name} {getattr(record, name)!r}; allowed: {', '.join(allowed)}"
            )
    return record


def _inside(root: Path, name: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"file {name!r} lies outside the data folder")
    return path


def _unpacked(archive: Path) -> Path:
    """Folder holding the archive's content; its name carries the archive's hash, so it is never stale."""
    name = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    parent = archive.resolve().parent
    if not os.access(parent, os.W_OK):
        parent = Path(tempfile.gettempdir())
    target = parent / f".{archive.name.split('.')[0]}-{name}"
    if target.is_dir():
        return target
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=parent))
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(staging, filter="data")
        staging.rename(target)
    except (tarfile.TarError, EOFError, OSError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        if target.is_dir():  # another process unpacked the same archive first
            return target
        raise ValueError(f"cannot unpack {archive}: {error}") from error
    return target
