"""Words for emoji pictures: what a person would type for the drawn thing, and for its style."""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspn2_diffusion.training.emoji import EmojiRecord

STYLE_WORDS = {
    "3d": "3d style",
    "flat": "flat style",
    "noto": "noto style",
    "blob": "blob style",
    "twemoji": "twemoji style",
    "emojione": "emojione style",
    "firefox-os": "firefox os style",
    "streamline": "streamline style",
}

_THINGS = frozenset(
    ("face", "cat", "monkey", "heart", "devil", "clown", "robot", "alien", "ghost", "skull", "poop", "boom")
)
NAME_SHARE = 0.65  # how often the name itself is used when there are aliases
ARTICLE_SHARE = 0.8  # how often a phrase that takes an article gets one

# Heads that take no "a": stuff, plurals without -s, and names of single things.
_BARE_HEADS_TEXT = """
bacon dna bread rice ice fire popcorn money salt butter broccoli garlic lightning poo sushi tempura
cheese candy honey milk tea sake coffee wine beer juice water fog rain snow wind smoke sweat wood
corn ginger edamame seaweed grass music ramen spaghetti noodles noodle thunder magic art food
dynamite confetti tennis bowling badminton hockey lacrosse golf karate judo boxing yarn jewelry fuji
zzz hay mate falafel people skis luggage scissors bubbles beans tofu pasta shopping pizza-dough hot-
dogs planet-earth traffic parachuting skating hail darts soil wheat herb-leaves
"""
_BARE_HEADS = frozenset(_BARE_HEADS_TEXT.split())
# Single things although they end in -s, and things counted although listed as stuff elsewhere.
_SINGULAR_TEXT = """
    bus cactus octopus walrus hibiscus lotus tennis-racquet compass abacus virus cross glass mattress
    rhinoceros hippopotamus tyrannosaurus platypus asparagus christmas grass dress princess atlas canvas
    kiss moss chess albatross brass albus sphinx press bass genius iris citrus
"""
_SINGULAR = frozenset(_SINGULAR_TEXT.split())
_AN = re.compile(
    r"(?!uni|euro|ewe|one\b|once|use|user|ufo|uk|u-|ukulele)[aeiou]|hour|honest|heir|x-ray|sos\b|atm\b|mri"
)
_HEAD_END = re.compile(
    r",| (?:of|with|without|in|on|at|over|from|behind|under|for|showing|facing|to|and|holding|by|blowing"
    r"|savoring|exhaling|screaming|vomiting|rolling|holding|shaking|fluttering)\b"
)
_OWN_ARTICLE = re.compile(
    r"(?:a|an|the|some|mount fuji|statue of liberty|tokyo tower|santa claus|planet earth)\b(?!-)"
)


def article(phrase: str) -> str:
    """The indefinite article that `phrase` takes: "a", "an" or "" (plurals, stuff, names)."""
    words = phrase.lower().strip()
    if not words or _OWN_ARTICLE.match(words):
        return ""
    head = _HEAD_END.split(words, maxsplit=1)[0].split()[-1].strip("'’!?.")
    if head in _BARE_HEADS or _is_plural(head):
        return ""
    return "an" if _AN.match(words) else "a"


def _is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "'s", "us", "is")) and word not in _SINGULAR


def with_article(phrase: str) -> str:
    """`phrase` behind its article: "owl" -> "an owl", "grapes" -> "grapes"."""
    found = article(phrase)
    return f"{found} {phrase}" if found else phrase


def object_phrase(record: EmojiRecord, rng: random.Random) -> str:
    """Words for the drawn thing as people type them: "a red apple", "red apple", "an owl", "smile".

    Mostly the name, otherwise an alias (the first ones, being the most usual, more often); mostly with
    its article.
    """
    words = record.name
    if record.aliases and rng.random() >= NAME_SHARE:
        words = record.aliases[min(int(rng.expovariate(1.0)), len(record.aliases) - 1)]
        if record.group == "smileys-emotion" and _is_mood(words):
            return words
    return with_article(words) if rng.random() < ARTICLE_SHARE else words


def coloured_phrase(record: EmojiRecord, colour: str) -> str:
    """The thing in a colour that it need not have in the data: "a blue apple" for the red one."""
    return with_article(f"{colour} {without_colour(record.name)}")


def counted_phrase(record: EmojiRecord, number: str, colour: str | None = None) -> str | None:
    """Several of the thing ("two apples", "three blue apples"), None where its name is not counted."""
    words = plural(without_colour(record.name) if colour else record.name)
    if words is None:
        return None
    return f"{number} {colour} {words}" if colour else f"{number} {words}"


def _is_mood(words: str) -> bool:
    """Whether a smiley's alias says how it looks ("grinning", "heart eyes") instead of what it is."""
    return not any(word in _THINGS for word in words.split())


def style_phrase(style: str) -> str:
    """The words that name a style in prompts: "firefox-os" -> "firefox os style".

    Raises:
        ValueError: the style is unknown.
    """
    if style not in STYLE_WORDS:
        raise ValueError(f"`style` is {style!r}; allowed: {', '.join(STYLE_WORDS)}")
    return STYLE_WORDS[style]


_COLOUR_WORDS = frozenset(
    "red orange yellow green blue purple brown black white grey gray pink golden silver".split()  # noqa: SIM905
)
_KEPT_COLOURS = frozenset(("black hole", "white cane", "green salad", "orange juice", "brown sugar"))
_IRREGULAR = {
    "mouse": "mice",
    "tooth": "teeth",
    "foot": "feet",
    "goose": "geese",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "loaf": "loaves",
    "scarf": "scarves",
    "cactus": "cacti",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "squid": "squid",
    "shrimp": "shrimp",
    "blowfish": "blowfish",
    "bison": "bison",
    "person": "people",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "mango": "mangoes",
    "mosquito": "mosquitoes",
}
_PREPOSITION = re.compile(
    r" (?:of|with|without|in|on|at|over|from|behind|under|for|showing|to|and|holding|by|blowing|exhaling"
    r"|savoring|screaming|vomiting|rolling)\b"
)


def without_colour(words: str) -> str:
    """The phrase without its colour word, so that another one can stand there: "red apple" -> "apple"."""
    if words in _KEPT_COLOURS:
        return words
    kept = [word for word in words.split() if word not in _COLOUR_WORDS]
    return " ".join(kept) or words


def plural(words: str) -> str | None:
    """Plural of a phrase ("cup of coffee" -> "cups of coffee"), None for what is not counted.

    Plurals, stuff ("rice") and names of single things are not counted.
    """
    if article(words) not in ("a", "an"):
        return None
    found = _PREPOSITION.search(words)
    head, rest = (words[: found.start()], words[found.start() :]) if found else (words, "")
    before, _, last = head.rpartition(" ")
    return f"{before} {_plural_word(last)}".strip() + rest


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"
