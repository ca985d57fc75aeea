"""Tables of the embedded model's card: what the judges said of it, in each of its ways to draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn2_diffusion.evaluation.document import markdown_table

MEASURES = {  # top-1 and top-5 of concepts stand in one row
    "concept of trained pairs, top-1 / top-5": ("concept_top1/seen", "concept_top5/seen"),
    "concept of pairs known only in other styles, top-5": ("concept_top5/unseen_pair",),
    "style of trained pairs": ("style/seen",),
    "style of pairs known only in other styles": ("style/unseen_pair",),
    "background colour": ("background",),
    "two things, both recognised and placed right": ("relation/pair",),
    "three things, all recognised and placed right": ("relation/triple",),
    "two, three or four of a thing": ("count",),
    "colour of the thing": ("colour",),
    "concepts it never saw, top-5": ("concept_top5/unseen_concept",),
}
SHORT = {
    "concept of trained pairs, top-1 / top-5": ("concept_top1/seen", "concept_top5/seen"),
    "style": ("style/seen",),
    "background": ("background",),
    "two things": ("relation/pair",),
    "two to four of a thing": ("count",),
}


def render(path: Path) -> str:
    """Markdown from the evaluation of a model at its own size, and those of the same name with a suffix."""
    own, few = (_read(path.with_name(f"{path.stem}{suffix}.json")) for suffix in ("", "-few"))
    ways = [
        f"{own['settings']['steps']} steps, guidance {own['settings']['guidance']:g} (95% interval)",
        f"{few['settings']['steps']} steps, adapter",
        "real",
    ]
    rows = [["measure", *ways]]
    for name, keys in MEASURES.items():
        found = [own["scores"][key] for key in keys]
        cells = [
            _joined(f"{_percent(s['value'])} ({100 * s['low']:.0f}-{100 * s['high']:.0f})" for s in found),
            _joined(_percent(few["scores"][key]["value"]) for key in keys),
            _joined(_percent(s["ceiling"]) for s in found),
        ]
        rows.append([name, *cells])
    sized = [["height x width", *SHORT]]
    files = path.parent.glob(f"{path.stem}-*x*.json")
    for facts in sorted(map(_read, files), key=lambda f: f["settings"]["height"] * f["settings"]["width"]):
        settings = facts["settings"]
        cells = [_joined(_percent(facts["scores"][key]["value"]) for key in keys) for keys in SHORT.values()]
        sized.append([f"{settings['height']} x {settings['width']}", *cells])
    between = (
        f"At sizes that it was not trained for ({own['settings']['steps']} steps, `{path.stem}-SIZE.json`):"
    )
    return f"{markdown_table(rows)}\n\n{between}\n\n{markdown_table(sized)}"


def _read(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 1 else "100%"


def _joined(texts: Any) -> str:
    return " / ".join(texts)
