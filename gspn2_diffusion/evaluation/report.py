"""Results as JSON, as a table in text, and as a picture sheet."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.evaluation.prompts import GROUPS, AskedPrompt, fingerprint
from gspn2_diffusion.evaluation.scoring import Findings
from gspn2_diffusion.training.sheets import contact_sheet, save_picture

SHEET_COLUMNS, SHEET_TILE = 16, 128


def results(
    prompts: Sequence[AskedPrompt],
    found: Findings,
    real: Findings,
    judge: Mapping[str, float],
    frechet: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON.

    Args:
        prompts: what was asked for.
        found: scores of the model's pictures.
        real: scores of the real pictures of the same prompts: the judges' ceiling.
        judge: accuracy of the judge on held-out real pictures.
        frechet: distances in the judge's feature space.
        settings: how the pictures were drawn.
    """
    ceiling = real.shares()
    scores = {
        name: {**asdict(value), "ceiling": ceiling[name].value} for name, value in found.shares().items()
    }
    return {
        "prompt_set": fingerprint(prompts),
        "prompts": dict(Counter(asked.group for asked in prompts)),
        "settings": dict(settings),
        "judge": dict(judge),
        "scores": scores,
        "judge_frechet_distance": dict(frechet),
        "environment": describe_environment(),
    }


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    """Write beside the name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def table(facts: Mapping[str, Any]) -> str:
    """The scores as aligned text: value, 95% interval, what the judges give real pictures."""
    rows = [("measure", "score", "95% interval", "real", "n")]
    for name, score in facts["scores"].items():
        interval = f"{score['low']:.1%} .. {score['high']:.1%}"
        rows.append((name, f"{score['value']:.1%}", interval, f"{score['ceiling']:.1%}", str(score["count"])))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    distance = facts["judge_frechet_distance"]
    if distance:
        lines.append(
            f"Frechet distance in the judge's feature space: {distance['value']:.3f} "
            f"({distance['low']:.3f} .. {distance['high']:.3f}); real pictures among themselves "
            f"{distance['real']:.3f}"
        )
    held = {key: value for key, value in facts["judge"].items() if "top" in key or "style" in key}
    lines.append("judge on held-out real pictures: " + ", ".join(f"{k} {v:.1%}" for k, v in held.items()))
    return "\n".join(lines)


def sheet(
    prompts: Sequence[AskedPrompt],
    pictures: Sequence[Image.Image],
    passed: Sequence[bool],
    path: Path,
    each: int = 16,
) -> None:
    """The first pictures of every group, uncurated; captions say which failed a judge."""
    chosen = [
        number
        for group in GROUPS
        for number in [i for i, asked in enumerate(prompts) if asked.group == group][:each]
    ]
    words = [f"{'' if passed[i] else '[x] '}{prompts[i].prompt}" for i in chosen]
    shown = [pictures[i] for i in chosen]
    save_picture(contact_sheet(shown, words, columns=SHEET_COLUMNS, tile=SHEET_TILE), path)
