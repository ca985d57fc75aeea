"""Which pictures a model may train on: concept clusters, style families and the hash that decides.

Two held-out splits, both decided by SHA-256 alone, so they never change with file order or machine:
``unseen_concept`` (a whole concept, in every style) and ``unseen_pair`` (a concept in one style family,
while other families of the same concept are trained on).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

STYLES = ("3d", "flat", "noto", "blob", "twemoji", "emojione", "firefox-os", "streamline")
SPLITS = ("train", "unseen_concept", "unseen_pair")
HELD_OUT_SHARE = 0.05

# The Fluent looks share their silhouettes, so they are held out, or trained on, together.
_FAMILIES = {"3d": "fluent", "flat": "fluent"}

_COLOURS = "red orange yellow green blue light dark purple brown black white grey gray pink gold silver"
_PEOPLE = (
    "man men woman women person people boy boys girl girls male female gentleman lady guy adult child baby "
    "older old hair bald blond curly beard bearded deaf mr mrs mx prince princess king queen santa claus "
    "mother father grandmother grandfather"
)
_PLACE = "left right up down upwards downwards facing tilted reversed open closed unopened back soon end top"
_SIZE = "small medium large heavy big tiny empty no without with"
_FILLER = "a an the of and in on to face head symbol sign button"
_VARIANT_WORDS = frozenset(f"{_COLOURS} {_PLACE} {_SIZE} {_FILLER}".split())
_PEOPLE_WORDS = frozenset(_PEOPLE.split())

# Whole families of near-equal drawings that no word rule finds.
_SAME = (
    (r"o.?clock|.*-thirty$|(alarm|mantelpiece) clock", "clock"),
    (r".*\bmoon( face)?", "moon"),
    (r"globe showing .*", "globe"),
    (r"(?!.*face).*\bhearts?\b(?! suit|.*eyes).*", "heart"),
    (r".*\b(cat)\b(?!.*fish).*", "cat"),
    (r".*\bmonkey\b.*", "monkey"),
    (r".*\b(camel)\b.*", "camel"),
    (r".*\b(dog|poodle)\b(?<!hot dog)$", "dog"),
    (r"(?:.*\b)?(books?|notebook|ledger)\b.*", "book"),
    (r".*\bmailbox\b.*", "mailbox"),
    (r"(?!red).*envelope.*|e-mail", "envelope"),
    (r"(?!beach).*umbrella.*", "umbrella"),
    (r".*\b(automobile|taxi|police car|sport utility vehicle)", "car"),
    (r".*\b(bus|minibus|trolleybus)\b(?! stop).*", "bus"),
    (r".*\b(train|locomotive|metro|tram|tram car|railway car|light rail|station|monorail)", "train"),
    (r".*\bhourglass\b.*", "hourglass"),
    (r".*\bmedal\b.*", "medal"),
    (r".*\bsnowman\b.*", "snowman"),
    (r".*\block(ed)?\b.*|unlocked", "lock"),
    (r".*\bspeaker\b.*", "speaker"),
    (r".*\bmagnifying glass\b.*", "magnifying-glass"),
    (r".*\b(hatching|baby|front-facing baby) chick\b.*", "chick"),
    (r".*\b(whale)\b.*", "whale"),
    (r".*\bbeer mugs?\b.*", "beer-mug"),
    (r".*\b(pager|fax machine)\b.*", "office-machine"),
    (r".*\b(diamond)\b.*", "diamond"),
    (r".*\b(square|circle)\b(?! academic).*", "block"),
    (r".*\bpair of hearts\b|.*\bhearts\b.*", "heart"),
    (r".*\bnotes?\b.*music.*|musical (notes?|score)", "musical-note"),
    (r".*\bribbon\b.*", "ribbon"),
    (r"(snow-capped )?mountain|mount fuji|volcano", "mountain"),
    (r".*\b(post office|office building|hotel|bank|hospital|school|department store)\b.*", "building"),
    (r".*\b(houses?|home)\b.*", "house"),
    (r"sun|sun with face|.*\bbehind .*cloud.*|cloud.*", "sun-and-cloud"),
    (r"fireworks|sparkler", "fireworks"),
    (r"(inbox|outbox) tray", "tray"),
    (r".*\bcalendar|spiral notepad", "calendar"),
    (r"(bar chart|chart) ?(increasing|decreasing)?.*", "chart"),
    (r"cityscape( at dusk)?|sunset|sunrise|night with stars|bridge at night|foggy", "city-view"),
    (r"ewe|ram|goat", "sheep"),
    (r".*\bbanknote", "banknote"),
    (r"bell|bell with slash", "bell"),
    (r"(empty nest|nest with eggs)", "nest"),
    (r"dvd|optical disk|computer disk", "disc"),
    (r"bullet train|high-speed train", "train"),
    (r"t-rex|sauropod", "dinosaur"),
    (r"(motor boat|speedboat)", "speedboat"),
    (r"(small )?airplane.*", "airplane"),
    (r"delivery truck|articulated lorry|pickup truck", "truck"),
    (r"(polar )?bear", "bear"),
    (r"horse( face)?|carousel horse", "horse"),
    (r"mobile phone.*", "mobile-phone"),
    (r"(video |movie )?camera( with flash)?", "camera"),
    (r"(paperclip|linked paperclips)", "paperclip"),
    (r"(seedling|herb|potted plant)", "plant"),
    (r"star|glowing star", "star"),
    (r"droplet|sweat droplets", "droplet"),
    (r"(horizontal|vertical) traffic light", "traffic-light"),
    (r"lobster|crab|shrimp", "crustacean"),
)
_SAME_COMPILED = tuple((re.compile(pattern), key) for pattern, key in _SAME)


def style_family(style: str) -> str:
    """Styles that count as one when a pair is held out ("3d" and "flat" -> "fluent")."""
    return _FAMILIES.get(style, style)


def concept_key(name: str, group: str) -> str:
    """Cluster of a CLDR name: colours, sides, genders and named look-alikes fall together.

    Smileys keep their words but for the fillers, since "face with X" differs in X alone.
    """
    words = re.sub(r"[^a-z0-9 ’'\-]+", " ", name.lower()).strip()
    if group != "people-body":
        for pattern, key in _SAME_COMPILED:
            if pattern.fullmatch(words) or (key == "clock" and pattern.search(words)):
                return key
    dropped = _VARIANT_WORDS | (_PEOPLE_WORDS if group in ("people-body", "smileys-emotion") else frozenset())
    pieces = [piece for piece in re.split(r"[\s\-]+", words) if piece]
    kept = [piece for piece in pieces if piece not in dropped]
    if not kept and group == "people-body":
        return "person"
    return "-".join(kept or pieces)


def _share(text: str) -> float:
    """Uniform number in [0, 1) that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def is_unseen_concept(concept: str) -> bool:
    """Whether the cluster is held out in every style."""
    return _share(f"concept:{concept}") < HELD_OUT_SHARE


def _is_unseen_pair(concept: str, family: str) -> bool:
    return _share(f"pair:{concept}:{family}") < HELD_OUT_SHARE


def assign_splits(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Split of every (concept, style) pair of the data set.

    A pair counts as unseen only while another family of its concept is trained on; otherwise nothing of
    the concept would be known and the pair belongs to neither split's question, so it stays in training.
    """
    known = sorted(set(pairs))
    families: dict[str, set[str]] = {}
    for concept, style in known:
        families.setdefault(concept, set()).add(style_family(style))
    held = {
        (concept, family) for concept, found in families.items() for family in _held_families(concept, found)
    }
    splits = {}
    for concept, style in known:
        if is_unseen_concept(concept):
            splits[concept, style] = "unseen_concept"
        else:
            unseen = (concept, style_family(style)) in held
            splits[concept, style] = "unseen_pair" if unseen else "train"
    return splits


def _held_families(concept: str, families: set[str]) -> set[str]:
    held = {family for family in families if _is_unseen_pair(concept, family)}
    return held if held < families else set()
