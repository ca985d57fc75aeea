"""Small log-log plots as SVG, for documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#2471a3", "#c0392b", "#d68910", "#7f8c8d")
_WIDTH, _HEIGHT, _LEFT, _TOP = 300, 240, 56, 34
_ROW = 3  # panels side by side, that a page as wide as a README's shows them large enough to be read


@dataclass(frozen=True)
class Panel:
    """Lines ``{name: [(x, y), ...]}`` over axes that are both logarithmic.

    Attributes:
        colours: by name; else those of :data:`COLOURS` in turn.
        joined: points are joined by lines.
    """

    title: str
    lines: dict[str, list[tuple[float, float]]]
    colours: dict[str, str] | None = None
    joined: bool = True


def svg(panels: Sequence[Panel]) -> str:
    """The panels, three in a row."""
    width, height = min(max(1, len(panels)), _ROW) * (_WIDTH + _LEFT) + 20, _HEIGHT + _TOP + 60
    drawn = "\n".join(
        f'<g transform="translate(0 {index // _ROW * height})">{_panel(index % _ROW, panel)}</g>'
        for index, panel in enumerate(panels)
    )
    height *= max(1, -(-len(panels) // _ROW))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + drawn
        + "\n</svg>\n"
    )


def _panel(index: int, panel: Panel) -> str:
    everything = [point for line in panel.lines.values() for point in line]
    if not everything:
        return ""
    xs, ys = ([math.log2(p[0]) for p in everything], [math.log10(p[1]) for p in everything])
    left, low, high = index * (_WIDTH + _LEFT) + _LEFT, math.floor(min(ys)), math.ceil(max(ys) + 1e-6)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - min(xs)) / max(max(xs) - min(xs), 1e-6)
        up = (math.log10(y) - low) / max(high - low, 1)
        return left + 10 + across * (_WIDTH - 30), _TOP + _HEIGHT * (1 - up)

    parts = [f'<text x="{left}" y="18" font-size="13">{escape(panel.title)}</text>']
    for exponent in range(low, high + 1):
        y = place(2 ** min(xs), 10.0**exponent)[1]
        parts.append(f'<line x1="{left}" x2="{left + _WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_power(exponent)}</text>')
    for size in _ticks(sorted({point[0] for point in everything})):
        x = place(size, 10.0**low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{_short(size)}</text>'
        )
    for number, (name, line) in enumerate(panel.lines.items()):
        colour = (panel.colours or {}).get(name, COLOURS[number % len(COLOURS)])
        spots = [place(*point) for point in line]
        if panel.joined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        x, y = left + number * 100, _TOP + _HEIGHT + 34
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return "\n".join(parts)


def _ticks(values: list[float]) -> list[float]:
    """At most seven of the values, far enough apart to be read."""
    chosen: list[float] = []
    apart = (math.log2(values[-1]) - math.log2(values[0])) / 8
    for value in values:
        if not chosen or math.log2(value) - math.log2(chosen[-1]) >= apart:
            chosen.append(value)
    return chosen


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10.0**exponent:g}"


def _short(value: float) -> str:
    for limit, letter in ((1e6, "M"), (1e5, "K")):
        if value >= limit:
            return f"{value / (1e6 if letter == 'M' else 1e3):.0f}{letter}"
    return f"{value:.0f}"
