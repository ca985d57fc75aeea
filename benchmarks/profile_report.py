"""A table of what ``profile_scan.py`` counted."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """Markdown: where the time of each kernel goes."""
    lines = [
        f"{result['gpu']}, commit {result['commit'][:7]}, by Nsight Compute, which times a launch on its own "
        "with cold caches. DRAM: bytes that moved over those that are needed. Waits: cycles of a warp for "
        "each of its instructions, the four longest.",
        "",
        "| B, H, W, C | scans | kernel | ms | DRAM | of its peak | L2 | L1 | issue slots | warps | waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        moved = (row["dram_read_bytes"] + row["dram_written_bytes"]) / row["needed_bytes"]
        shares = [f"{row['percent_of_peak'][name]:.0f}%" for name in ("dram", "l2", "l1", "issue")]
        waits = ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in row["waits"].items())
        cells = [
            ", ".join(map(str, row["shape"])),
            row["scans"],
            row["kernel"].removeprefix("line_scan_").replace("_", " "),
        ]
        cells += [f"{row['ms']:.3f}", f"{moved:.2f}x", *shares, f"{row['warps']:.0f}", waits]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
