"""docs/results.md and its plot, made from the result files alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = (
    *("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e"),
    *("#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22"),
)
_PLOTTED_FROM = 0.25  # share of the training before which all curves fall alike
_MEASURES = (
    ("concept_top1/seen", "seen pairs, concept top-1"),
    ("concept_top5/seen", "seen pairs, concept top-5"),
    ("concept_top1/unseen_pair", "unseen pairs, concept top-1"),
    ("concept_top5/unseen_pair", "unseen pairs, concept top-5"),
    ("concept_top5/unseen_concept", "unseen concepts, concept top-5"),
    ("style/seen", "seen pairs, style"),
    ("style/unseen_pair", "unseen pairs, style"),
    ("background", "background colour, all prompts"),
    ("relation/pair", "two things, both recognised and in place"),
    ("relation/triple", "three things, all recognised and in place"),
    ("count", "two to four of a thing, counted right"),
    ("colour", "colour of the thing"),
)
_SHORT = ("concept_top1/seen", "concept_top5/unseen_pair", "style/seen", "background", "relation/pair")
_MISSING = "Not measured yet."
TRANSFER_SHEET = "results-transfer.webp"
_BASE = (
    " `base` is the shape of the embedded model (`configs/gspn2-emoji-transformer.json`): proxies of C/4, "
    "weights shared by all channels, four directions, no chunks, local perception. The others change one of "
    "these, so they differ in parameters, too."
)
_WIDE = (
    " `gspn2-proxy-C/2` has proxies twice as wide as `gspn2` and pays for them with a narrower feed-forward."
)
_TRANSFER = (
    "The same weights, trained at 256 px alone, at other sizes. Line scans are kept in balance there "
    "(`balance_scans` of the pipeline), softmax attention has axial rotary positions; "
    "a model named after a mixer is that of the table above."
)


def write_document(results: Path, document: Path) -> Path:
    """Write the document, and ``results-<study>.svg`` beside it.

    Args:
        results: folder with ``evaluation-*.json``, ``mixers.json`` and ``ablations.json``, each optional.
        document: the Markdown file.
    """
    studies = {name: _read(results / f"{name}.json") for name in ("mixers", "ablations")}
    files = {path.stem: path for path in results.glob("evaluation-*.json")}
    evaluations = {name: _read(files[name]) for name in sorted(files)}
    parts = [
        "# Results",
        "Made by `python scripts/compare_mixers.py report` from the files in `benchmarks/results`; nothing "
        "here is typed by hand. Shares come with 95% Wilson intervals. Real: what the same judges give "
        "pictures composed from the real sprites of the same prompts, the ceiling.",
        _evaluations(evaluations),
    ]
    for name, title in (("mixers", "Mixers at equal parameters"), ("ablations", "Ablations")):
        parts.append(f"## {title}\n\n" + _study(studies[name], name, document.parent))
    transfer = _resolutions(studies["mixers"], evaluations)
    if (document.parent / TRANSFER_SHEET).is_file():
        transfer += f"\n\nThe same ten prompts and seeds:\n\n![Pictures of several sizes]({TRANSFER_SHEET})"
    parts.append(f"## Resolution transfer\n\n{_TRANSFER}\n\n{transfer}")
    document.parent.mkdir(parents=True, exist_ok=True)
    _write(document, "\n\n".join(parts) + "\n")
    return document


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(score: Mapping[str, Any] | None) -> str:
    return f"{score['value']:.1%} ({score['low']:.0%}-{score['high']:.0%})" if score else "-"


def _evaluations(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """Every evaluated model at its own size."""
    parts = ["## Embedded models"]
    whole = {name: facts for name, facts in evaluations.items() if not _sized(name)}
    for name, facts in whole.items():
        settings, scores = facts["settings"], facts["scores"]
        rows = [["measure", "score (95%)", "real", "n"]]
        for key, words in _MEASURES:
            if key in scores:
                score = scores[key]
                rows.append([words, _percent(score), f"{score['ceiling']:.1%}", str(score["count"])])
        distance = facts.get("judge_frechet_distance") or {}
        if distance:
            rows.append(
                [
                    "Frechet distance in the judge's feature space",
                    f"{distance['value']:.2f} ({distance['low']:.2f}-{distance['high']:.2f})",
                    f"{distance['real']:.2f}",
                    str(distance["pictures"]),
                ]
            )
        held = ", ".join(
            f"{key.replace('_', ' ')} {value:.1%}"
            for key, value in facts["judge"].items()
            if key.endswith(("top1", "top5", "style"))
        )
        parts.append(
            f"### {name.removeprefix('evaluation-')}\n\n{settings['height']}x{settings['width']}, "
            f"{settings['steps']} steps, guidance {settings['guidance']}, prompt set {facts['prompt_set']}, "
            f"{facts['environment']['gpu']}, {facts['environment']['date'][:10]}.\n\n"
            f"{markdown_table(rows)}\n\nThe judge itself on real pictures kept from it: {held}."
        )
    return "\n\n".join(parts if whole else [*parts, _MISSING])


def _sized(name: str) -> bool:
    """Whether the name ends with a size, "-192x320"."""
    high, _, wide = name.rpartition("-")[2].partition("x")
    return high.isdigit() and wide.isdigit()


def _study(facts: Mapping[str, Any], name: str, folder: Path) -> str:
    if not facts:
        return _MISSING
    variants: dict[str, Any] = facts["variants"]
    settings, environment = facts["settings"], facts["environment"]
    first = next(iter(variants.values()))
    days = sorted({facts.get("made", environment)["date"][:10] for facts in variants.values()})
    start = (
        f"Each variant was trained for {settings['steps']:,} steps of {settings['batch']} pictures "
        f"({first['pictures']:,}) from seed {settings['seed']}, in the same order, on one "
        f"{environment['gpu']} ({', '.join(days)}, torch {environment['torch']})."
    )
    if first.get("step_milliseconds_alone"):
        start += (
            f" Steps ({first['step_pictures_alone']} pictures, forward and backward, not compiled) were "
            "timed afterwards, with the GPU to themselves."
        )
    if "base" in variants:
        start += _BASE
    if "gspn2-proxy-C/2" in variants:
        start += _WIDE
    judged = [bool(facts.get("evaluation")) for facts in variants.values()]
    if any(judged) and not all(judged):
        start += " Those without scores were trained, not judged."
    curves = {key: value["validation"] for key, value in variants.items()}
    _write(folder / f"results-{name}.svg", plot(curves, "val_unseen_pair"))
    failed = f"\n\nFailed runs: {', '.join(facts['failed'])}." if facts["failed"] else ""
    picture = f"![Validation loss on unseen pairs](results-{name}.svg)"
    return f"{start}{failed}\n\n{markdown_table(_rows(variants))}\n\n{picture}{_all_scores(variants)}"


def _all_scores(variants: Mapping[str, Any]) -> str:
    """Every measure of every variant that was judged, without intervals."""
    judged = {
        name: facts["evaluation"]["results"]
        for name, facts in variants.items()
        if (facts.get("evaluation") or {}).get("results")
    }
    if not judged:
        return ""
    rows = [["measure", *judged, "real"]]
    for key, words in _MEASURES:
        scores = [facts["scores"].get(key) for facts in judged.values()]
        if all(scores):
            values = [f"{score['value']:.1%}" for score in scores]
            rows.append([words, *values, f"{scores[0]['ceiling']:.1%}"])
    distances = [facts.get("judge_frechet_distance") for facts in judged.values()]
    if all(distances):
        values = [f"{distance['value']:.1f}" for distance in distances]
        real = f"{distances[0]['real']:.1f}"
        rows.append(["Frechet distance in the judge's feature space", *values, real])
    return f"\n\nAll scores:\n\n{markdown_table(rows)}"


def _rows(variants: Mapping[str, Any]) -> list[list[str]]:
    judged = dict(_MEASURES)
    name_of_base = next((name for name in ("softmax", "base") if name in variants), next(iter(variants)))
    columns = ["variant", "parameters", "val loss seen", "val loss unseen pairs", f"against {name_of_base}"]
    short = _SHORT if any(facts.get("evaluation") for facts in variants.values()) else ()
    rows = [[*columns, "ms a step", "GiB", *(judged[key] for key in short)]]
    base = variants[name_of_base]["validation"][-1].get("val_unseen_pair")
    for name, facts in variants.items():
        last = facts["validation"][-1]
        unseen = last.get("val_unseen_pair")
        apart = f"{unseen / base - 1:+.1%}" if unseen and base else "-"
        scores = ((facts.get("evaluation") or {}).get("results") or {}).get("scores", {})
        rows.append(
            [
                name,
                f"{facts['parameters'] / 1e6:.2f}M",
                _number(last.get("val_train"), 4),
                _number(unseen, 4),
                apart,
                _number(facts.get("step_milliseconds_alone") or facts.get("step_milliseconds"), 1),
                _number(facts.get("memory_gib"), 1),
                *(_percent(scores.get(key)) for key in short),
            ]
        )
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _resolutions(study: Mapping[str, Any], evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The same weights at their own size and at sizes that they were not trained for."""
    judged = dict(_MEASURES)
    rows = [["model", "height x width", *(judged[key] for key in _SHORT)]]
    found: dict[str, list[Any]] = {
        name.removeprefix("evaluation-").rpartition("-")[0]: [] for name in evaluations if _sized(name)
    }
    for name, facts in evaluations.items():
        short = name.removeprefix("evaluation-")
        own = short.rpartition("-")[0] if _sized(name) else short
        if own in found:  # the model's own size stands among the others
            found[own].append(facts)
    for name, facts in (study.get("variants") or {}).items():
        several = list((facts.get("evaluation") or {}).values())
        if len(several) > 1:
            found[name] = several
    for name, several in found.items():
        for facts in sorted(several, key=lambda item: item["settings"]["height"] * item["settings"]["width"]):
            settings = facts["settings"]
            scores = [_percent(facts["scores"].get(key)) for key in _SHORT]
            rows.append([name, f"{settings['height']}x{settings['width']}", *scores])
    return markdown_table(rows) if len(rows) > 1 else _MISSING


def plot(curves: Mapping[str, Sequence[Mapping[str, float]]], measure: str) -> str:
    """An SVG line plot of a measure over pictures, one line for each run, without the first quarter.

    Args:
        curves: points of each run.
        measure: key of the points' values, above 0; their axis is logarithmic.
    """
    right = max((point["pictures"] for points in curves.values() for point in points), default=0)
    lines = {
        name: [
            (point["pictures"], math.log(point[measure]))
            for point in points
            if measure in point and point["pictures"] >= max(_PLOTTED_FROM * right, 1)
        ]
        for name, points in curves.items()
    }
    every = [point for points in lines.values() for point in points]
    if not every:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>\n'
    low, high = min(y for _, y in every), max(y for _, y in every)
    start = min(x for x, _ in every)
    length, span = (right - start) or 1.0, (high - low) or 1.0
    wide, tall, left, top = 560, 300, 60, 20

    def at(x: float, y: float) -> str:
        return f"{left + wide * (x - start) / length:.1f},{top + tall * (high - y) / span:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 170}" height="{top + tall + 50}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect x="{left}" y="{top}" width="{wide}" height="{tall}" fill="white" stroke="#888"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = top + tall * share, left + wide * share
        value = math.exp(high - span * share)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.0f}" text-anchor="end">{value:.3f}</text>')
        words = f"{(start + length * share) / 1e6:.2f}M"
        parts.append(f'<text x="{x:.0f}" y="{top + tall + 18}" text-anchor="middle">{words}</text>')
    parts.append(f'<text x="{left + wide / 2}" y="{top + tall + 40}" text-anchor="middle">pictures</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(at(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + wide + 10}" y="{top + 16 + 18 * number}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
