"""A table and a plot of what ``models.py`` measured."""

from __future__ import annotations

from typing import Any

import plot

KEY = ("family", "pixels", "variant", "mode")
COLOURS = {"attention": "#c0392b", "gspn2": "#2471a3", "none": "#7f8c8d"}


def _times(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]:
    """Rows by family and mode, then variant, then pixels."""
    found: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    order = list(dict.fromkeys(row["family"] for row in result["rows"]))
    # Families together, in whichever of several runs their rows were measured.
    for row in sorted(result["rows"], key=lambda row: (order.index(row["family"]), row["mode"] != "eager")):
        panel = found.setdefault((row["family"], row["mode"]), {})
        panel.setdefault(row["variant"], {})[row["pixels"]] = row
    return found


def render(result: dict[str, Any]) -> str:
    """Markdown: milliseconds (and peak GB) of every variant, and the two ratios."""
    commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in result["rows"]))
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['dtype'].removeprefix('torch.')}, commit "
        f"{commits}; milliseconds of one denoiser call (peak GB).",
        "",
        "| model | pixels | mode | attention | GSPN-2 | no mixer | over no mixer | faster than attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = {(c["family"], c["pixels"], c["mode"]): c for c in result["comparisons"]}
    for (family, mode), variants in _times(result).items():
        for pixels in sorted({size for rows in variants.values() for size in rows}):
            cells = [_cell(variants.get(name, {}).get(pixels)) for name in COLOURS]
            ratio = ratios.get((family, pixels, mode), {})
            over = f"{ratio['over_none']:.2f}" if "over_none" in ratio else ""
            faster = f"{ratio['speedup']:.1f}x" if "speedup" in ratio else ""
            lines.append(f"| {' | '.join([family, str(pixels), mode, *cells, over, faster])} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return row["error"].split(":")[0]
    memory = f" ({row['peak_bytes'] / 1e9:.1f})" if row["peak_bytes"] else ""
    return f"{row['ms']:.1f}{memory}" + ("" if row["finite"] else " not finite")


def svg(result: dict[str, Any]) -> str:
    """One panel per family and mode: time over pixels, both logarithmic."""
    return plot.svg(
        [
            plot.Panel(
                f"{family} {mode}: ms, by pixels",
                {
                    name: [(size, row["ms"]) for size, row in sorted(rows.items()) if "ms" in row]
                    for name, rows in variants.items()
                },
                COLOURS,
            )
            for (family, mode), variants in _times(result).items()
        ]
    )
