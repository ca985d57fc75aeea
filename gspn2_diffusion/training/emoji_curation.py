"""Which pictures are worth teaching, and which must not be mirrored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspn2_diffusion.training.emoji import EmojiRecord

# Many near-equal drawings that nobody asks for by name, and pictures whose name does not say what is seen.
_LEFT_OUT = re.compile(
    r".*o.?clock|.*-thirty|(new|full|(first|last) quarter|w\w+ (crescent|gibbous)) moon( face)?|mahjong .*"
    r"|flower playing cards|.*\b(suit|pager|trackball|optical disk|minidisc)|level slider|control knobs"
    r"|card (file box|index dividers)|(open |closed )?mailbox with .*|last .*|hundred points|"
    r"(clockwise|counterclockwise|end|soon|back|on|top) arrow.*|eye in speech bubble|keycap.*"
)
_KEPT = frozenset(("full moon", "new moon"))
# Drawings with letters, figures, hands or a side that the name depends on.
_LETTERED = re.compile(
    r".*(clock|watch|calendar|card|dice|\bdie\b|medal|banknote|\byen\b|dollar|euro|pound|money|chart|"
    r"increasing|decreasing|letter|memo|newspaper|book|scroll|ticket|sign|keyboard|score|note|map|globe|"
    r"billiard|question|exclamation|hundred|points|moon|flag|left|right|japan|mahjong|dvd|disk|receipt|"
    r"bank|hospital|hotel|school|store|office|atm|sos|abc|hashtag|number|speech|thought|email|label|tag|"
    r"computer|calculator|telephone|phone|slot machine|trophy|ballot|credit|passport|thermometer|ruler).*"
)


def is_curated(record: EmojiRecord) -> bool:
    """Whether the picture belongs to the curated set."""
    return record.name in _KEPT or not _LEFT_OUT.fullmatch(record.name)


def curated(records: Iterable[EmojiRecord]) -> list[EmojiRecord]:
    """The curated pictures, in order."""
    return [record for record in records if is_curated(record)]


def is_lettered(record: EmojiRecord) -> bool:
    """Whether mirroring would show (letters, dials, sides)."""
    return _LETTERED.fullmatch(record.name) is not None
