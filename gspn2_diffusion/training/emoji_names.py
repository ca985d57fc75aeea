"""Names of the drawn things: which concept a package's file name means, and what people call it.

Joins work on Unicode code points where a package lists them, and on names made comparable (lower case,
letters and digits only) where it does not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gspn2_diffusion.training.emoji_splits import concept_key
from gspn2_diffusion.training.emoji_words import DROPPED_ALIASES, EXTRA_ALIASES, NAMES

GROUP_OF_NUMBER = {
    0: "smileys-emotion",
    1: "people-body",
    3: "animals-nature",
    4: "food-drink",
    5: "travel-places",
    6: "activities",
    7: "objects",
    8: "symbols",
}

_FIRST_STEPS = ("emojibase", "cldr", "github", "joypixels", "iamcal", "emojibase-legacy")
_WORD = re.compile(r"[a-z][a-z'\-]{2,}")
_NOT_CAPTIONS_TEXT = """
    person man woman people boy girl skin tone face emotion emoji symbol thing item object nature animal
    food drink building travel transport vehicle tool sign button shape the and not very for too hot new
    up down left right mac gmail microsoft apple facebook whatsapp instagram snapchat bye hello lol omg
    wtf nsfw sex sexy butt boobs tits penis condom
"""
_NOT_CAPTIONS = frozenset(_NOT_CAPTIONS_TEXT.split())
_STOP_ALIASES_TEXT = """
    tone x o v m us a b ab
"""
_STOP_ALIASES = frozenset(_STOP_ALIASES_TEXT.split())


@dataclass(frozen=True)
class Concept:
    """One emoji of the naming data."""

    hexcode: str
    name: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    key: str


def compact(text: str) -> str:
    """Letters and digits only, so "Smiling Face", "smiling-face" and "smilingface" compare equal."""
    return re.sub(r"[^a-z0-9]+", "", text.lower().replace("&", "and"))


def plain_hex(code: str) -> str:
    """Code points as upper-case "1F43B-200D-2744", without variation selectors and leading zeros."""
    points = [point.lstrip("0") or "0" for point in code.upper().replace("_", "-").split("-")]
    return "-".join(point for point in points if point != "FE0F")


def clean_name(label: str) -> str:
    """Caption words of an official label: "keycap: 1" -> "keycap 1", "T-Rex" -> "t-rex"."""
    words = re.sub(r"[“”\"()!:]+", " ", label.lower().replace("’", "'"))
    return re.sub(r"\s+", " ", words).strip()


def _same_words(first: str, second: str) -> bool:
    return sorted(first.split()) == sorted(second.split())


_CLOCK = re.compile(r"(?:o'clock|-thirty)$")


def caption_name(label: str) -> str:
    """What people would call the thing: mostly the official label; any clock face is "clock"."""
    name = clean_name(NAMES.get(label, label))
    return "clock" if _CLOCK.search(name) else name


def _extra_aliases(label: str) -> list[str]:
    if _CLOCK.search(clean_name(label)):
        return [f"clock showing {clean_name(label)}"]
    return [word for word in EXTRA_ALIASES.get(label, "").split(", ") if word]


def build_concepts(
    emojibase: Iterable[Mapping[str, Any]],
    shortcodes: Mapping[str, Mapping[str, Any]],
    emojilib: Mapping[str, list[str]],
) -> dict[str, Concept]:
    """Concepts by plain hex code, without flags, components and skin tones.

    Args:
        emojibase: ``en/data.json`` of emojibase-data (skin tones are nested in it, so they fall away).
        shortcodes: its shortcode sets by set name, hex code -> one code or a list.
        emojilib: emoji -> keywords, the first being the name.
    """
    rows = [row for row in emojibase if row.get("group") in GROUP_OF_NUMBER]
    keys = {row["hexcode"]: concept_key(row["label"], GROUP_OF_NUMBER[row["group"]]) for row in rows}
    names = {row["hexcode"]: caption_name(row["label"]) for row in rows}
    raw = {row["hexcode"]: _raw_aliases(row, shortcodes, emojilib) for row in rows}
    clusters: dict[str, set[str]] = {}
    for code, words in [(code, word) for code, found in raw.items() for word in found]:
        clusters.setdefault(words, set()).add(keys[code])
    for code, name in names.items():
        clusters.setdefault(name, set()).add(keys[code])
    concepts = {}
    for row in rows:
        code = row["hexcode"]
        extra = _extra_aliases(row["label"])
        # a word that also means something else would teach the wrong picture
        own = [word for word in raw[code] if len(clusters[word]) == 1]
        aliases = [word for word in dict.fromkeys(extra + own) if not _same_words(word, names[code])]
        concepts[plain_hex(code)] = Concept(
            hexcode=plain_hex(code),
            name=names[code],
            aliases=tuple(aliases[:6]),
            tags=_tags(row, emojilib),
            group=GROUP_OF_NUMBER[row["group"]],
            key=keys[code],
        )
    return concepts


def _codes(shortcodes: Mapping[str, Mapping[str, Any]], kind: str, code: str) -> list[str]:
    found = shortcodes.get(kind, {}).get(code, [])
    return [found] if isinstance(found, str) else list(found)


def _raw_aliases(
    row: Mapping[str, Any], shortcodes: Mapping[str, Mapping[str, Any]], emojilib: Mapping[str, list[str]]
) -> list[str]:
    found = []
    for kind in ("github", "emojibase", "iamcal"):
        found += _codes(shortcodes, kind, row["hexcode"])
    found += emojilib.get(row["emoji"], [])[:1]
    words = [re.sub(r"[_\-]+", " ", code).strip().lower() for code in found]
    return [word for word in dict.fromkeys(words) if _is_alias(word)]


def _is_alias(word: str) -> bool:
    """Real words only: "+1", "non potable water2" and country codes are not captions."""
    pieces = word.split()
    return (
        re.fullmatch(r"[a-z][a-z ']{2,}", word) is not None
        and not _STOP_ALIASES.intersection(pieces)
        and word not in _NOT_CAPTIONS
        and word not in DROPPED_ALIASES
        and " s " not in word
        and len(pieces) <= 5
    )


def _tags(row: Mapping[str, Any], emojilib: Mapping[str, list[str]]) -> tuple[str, ...]:
    found = [*row.get("tags", []), *emojilib.get(row["emoji"], [])[1:]]
    words = [str(tag).lower().replace("_", " ") for tag in found]
    usable = [word for word in words if _WORD.fullmatch(word) and word not in _NOT_CAPTIONS]
    return tuple(dict.fromkeys(usable))[:12]


class NameIndex:
    """Finds the concept that a file name means; the surest sources of names come first."""

    def __init__(self, concepts: Mapping[str, Concept]) -> None:
        self._concepts = concepts
        self._found: dict[str, str] = {}

    def add(self, names: Iterable[tuple[str, str]]) -> None:
        """Take (name, hex code) pairs of one source; earlier sources win, and within one source a name
        that means several concepts is left out."""
        pairs = {
            (compact(name), plain_hex(code)) for name, code in names if plain_hex(code) in self._concepts
        }
        counts = Counter(name for name, _ in pairs)
        for name, code in pairs:
            if counts[name] == 1 and name:
                self._found.setdefault(name, code)

    def find(self, slug: str) -> str | None:
        """Hex code for a file name; numbered variants ("bread-1") count as the thing itself."""
        for candidate in (slug, re.sub(r"-\d$", "", slug)):
            code = self._found.get(compact(candidate))
            if code is not None:
                return code
        return None


def shortcode_names(shortcodes: Mapping[str, Mapping[str, Any]]) -> Iterable[list[tuple[str, str]]]:
    """(shortcode, hex code) lists, one per set, the most official first."""
    for kind in _FIRST_STEPS:
        codes = shortcodes.get(kind, {})
        yield [(word, code) for code in codes for word in _codes(shortcodes, kind, code)]
