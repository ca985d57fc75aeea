"""From pictures to scores: every picture is read and judged, every measure is a share with an interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gspn2_diffusion.evaluation import pixels
from gspn2_diffusion.evaluation.judge import Judge, Verdicts, judge_crops
from gspn2_diffusion.evaluation.prompts import AskedPrompt
from gspn2_diffusion.evaluation.statistics import Share, share

_SINGLE = ("seen", "unseen_pair", "unseen_concept", "colour")


@dataclass
class Findings:
    """What was found in the pictures.

    Attributes:
        outcomes: results by measure, one per picture that the measure applies to.
        passed: by picture, whether everything that was asked for was found.
        features: (N, D) of the judge, of the single things of `featured` groups.
    """

    outcomes: dict[str, list[bool]] = field(default_factory=dict)
    passed: list[bool] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def shares(self) -> dict[str, Share]:
        """Every measure with its interval."""
        return {name: share(results) for name, results in sorted(self.outcomes.items())}


@dataclass
class _Reading:
    """One picture: where its crops start, and what its pixels say."""

    first: int
    crops: int
    background: str
    count: int
    coloured: bool | None


def score(
    judge: Judge, prompts: Sequence[AskedPrompt], picture: Callable[[int], Tensor], likeliest: int = 5
) -> Findings:
    """Read and judge pictures.

    Args:
        judge: names concepts and styles.
        prompts: what was asked for.
        picture: gives the picture of a prompt by its number, (3, H, W) in 0..1 on the CPU.
        likeliest: concepts among which the asked one must be in scenes of several things.

    Returns:
        Outcomes: ``concept_top1/<group>``, ``concept_top5/<group>``, ``style/<group>``, ``background``,
        ``relation/pair`` and ``relation/triple`` (every thing among the five likeliest, and in its place),
        ``count`` (exact) with ``count/2`` .. ``count/4``, and ``colour``.
    """
    readings: list[_Reading] = []
    crops: list[Tensor] = []
    for number, asked in enumerate(prompts):
        reading, found = _read(asked, picture(number), judge.size.side, len(crops))
        readings.append(reading)
        crops += found
    findings = Findings()
    if not crops:
        return findings
    verdicts = judge_crops(judge, torch.stack(crops))
    concept = {name: index for index, name in enumerate(judge.concepts)}
    kept = []
    for asked, reading in zip(prompts, readings, strict=True):
        results = _outcomes(asked, reading, verdicts, concept, judge.styles, likeliest)
        for name, result in results.items():
            findings.outcomes.setdefault(name, []).append(result)
        findings.passed.append(all(ok for name, ok in results.items() if not name.startswith("concept_top1")))
        if asked.group in ("seen", "unseen_pair"):
            kept.append(reading.first)
    findings.features = verdicts.features[kept]
    return findings


def _read(asked: AskedPrompt, picture: Tensor, side: int, first: int) -> tuple[_Reading, list[Tensor]]:
    mask = pixels.foreground(picture)
    if asked.layout == "group":
        pieces = [pixels.largest(mask)]
    else:
        pieces = pixels.parts(mask, asked.layout, asked.count)
    count = pixels.count_things(mask) if asked.layout == "group" else asked.count
    coloured = pixels.has_colour(picture, mask, asked.colour) if asked.colour else None
    crops = [pixels.crop(picture, piece, side) for piece in pieces]
    return _Reading(first, len(crops), pixels.background_word(picture), count, coloured), crops


def _outcomes(
    asked: AskedPrompt,
    reading: _Reading,
    verdicts: Verdicts,
    concept: dict[str, int],
    styles: Sequence[str],
    likeliest: int,
) -> dict[str, bool]:
    outcome: dict[str, bool] = {"background": reading.background == asked.background}
    rows = verdicts.concepts[reading.first : reading.first + reading.crops]
    if asked.layout in ("row", "column"):
        names = [row[:likeliest].tolist() for row in rows]
        right = [concept.get(name, -1) in found for name, found in zip(asked.concepts, names, strict=True)]
        outcome[f"relation/{asked.group}"] = all(right)
        outcome[f"one_thing/{asked.group}"] = any(right)
    elif asked.layout == "group":
        exact = reading.count == asked.count
        outcome |= {"count": exact, f"count/{asked.count}": exact}
        outcome["count_concept_top5"] = concept.get(asked.concepts[0], -1) in rows[0].tolist()
    if asked.group in _SINGLE:
        wanted = concept.get(asked.concepts[0], -1)
        outcome[f"concept_top1/{asked.group}"] = int(rows[0][0]) == wanted
        outcome[f"concept_top5/{asked.group}"] = wanted in rows[0].tolist()
        outcome[f"style/{asked.group}"] = styles[int(verdicts.styles[reading.first])] == asked.style
    if reading.coloured is not None:
        outcome["colour"] = reading.coloured
    return outcome
