"""A table and a plot of what ``models.py`` measured."""

from __future__ import annotations

import math
from typing import Any
from xml.sax.saxutils import escape

KEY = ("family", "pixels", "variant", "mode")
COLOURS = {"attention": "#c0392b", "gspn2": "#2471a3", "none": "#7f8c8d"}
_WIDTH, _HEIGHT, _LEFT, _TOP = 300, 240, 56, 34


def _times(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]:
    """Rows by family and mode, then variant, then pixels."""
    found: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in result["rows"]:
        panel = found.setdefault((row["family"], row["mode"]), {})
        panel.setdefault(row["variant"], {})[row["pixels"]] = row
    return found


def render(result: dict[str, Any]) -> str:
    """Markdown: milliseconds (and peak GB) of every variant, and the two ratios."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['dtype'].removeprefix('torch.')}, commit "
        f"{result['commit'][:8]}; milliseconds of one denoiser call (peak GB).",
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
    panels = list(_times(result).items())
    parts = [_panel(index, title, variants) for index, (title, variants) in enumerate(panels)]
    width = max(1, len(panels)) * (_WIDTH + _LEFT) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT + _TOP + 60}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(index: int, title: tuple[str, str], variants: dict[str, dict[int, dict[str, Any]]]) -> str:
    points = {
        name: [(size, row["ms"]) for size, row in sorted(rows.items()) if "ms" in row]
        for name, rows in variants.items()
    }
    everything = [point for line in points.values() for point in line]
    if not everything:
        return ""
    xs, ys = ([math.log2(p[0]) for p in everything], [math.log10(p[1]) for p in everything])
    left, low, high = index * (_WIDTH + _LEFT) + _LEFT, math.floor(min(ys)), math.ceil(max(ys) + 1e-6)

    def place(size: float, ms: float) -> tuple[float, float]:
        x = (math.log2(size) - min(xs)) / max(max(xs) - min(xs), 1e-6)
        y = (math.log10(ms) - low) / max(high - low, 1)
        return left + 10 + x * (_WIDTH - 30), _TOP + _HEIGHT * (1 - y)

    parts = [f'<text x="{left}" y="18" font-size="13">{escape(" ".join(title))}: ms, by pixels</text>']
    for exponent in range(low, high + 1):
        y = place(2 ** min(xs), 10.0**exponent)[1]
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**exponent:g}</text>')
    for size in sorted({point[0] for point in everything}):
        x = place(size, 10.0**low)[0]
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{size}</text>')
    for number, (name, line) in enumerate(points.items()):
        spots = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}"/>' for x, y in spots]
        y = _TOP + _HEIGHT + 34
        parts.append(f'<text x="{left + number * 90}" y="{y}" fill="{COLOURS[name]}">{escape(name)}</text>')
    return "\n".join(parts)
