"""A table of what ``block_kernels.py`` measured."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """Markdown: milliseconds of the kernel and of plain torch."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, bfloat16, commit {result['commit'][:7]}; milliseconds.",
        "",
        "| kernel | B, H, W, C | forward | copy | plain torch | | both passes | plain torch | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        cells = [row["kernel"], ", ".join(map(str, row["shape"]))]
        for kind in ("forward", "both"):
            own, plain = row[f"cupy_{kind}_ms"], row[f"reference_{kind}_ms"]
            copy = [f"{row['copy_ms']:.3f}"] if kind == "forward" else []
            cells += [f"{own:.3f}", *copy, f"{plain:.3f}", f"{plain / own:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
