"""Tables of docs/high-resolution.md, out of result files."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def sizes(result: Row) -> str:
    """Markdown of a result of ``high_resolution.py``."""
    rows, cpu = result["rows"], result["gpu"] == "none"
    where = f"{rows[0]['threads']} CPU threads" if cpu else result["gpu"]
    lines = [
        f"{where}, {result['dtype']}, torch {result['torch']}, {rows[0]['steps']} steps of the whole "
        f"schedule, strength {rows[0]['strength']}.",
        "",
        "| pixels | seconds | seconds a step at this size | decoding and writing | peak memory | planned |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        step, start = row["seconds_per_step_at_full_size"], row.get("started_from")
        pixels = f"{row['pixels']}, refined from {start}" if start else str(row["pixels"])
        seconds = f"{row['seconds']:.{0 if row['seconds'] >= 10 else 1}f}"
        lines.append(
            f"| {pixels} | {seconds} | {'' if step is None else f'{step:.2f}'} | "
            f"{row['decode_and_write_seconds']:.1f} | {row['peak_bytes'] / 1e9:.2f} GB | "
            f"{row['planned_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def several_gpus(result: Row) -> str:
    """Markdown of a result of ``two_gpus.py``."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}; milliseconds of one denoising step (peak GB of a GPU).",
        "",
        "| pixels | one GPU | GPUs | together | times faster | relative difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        one, every = (
            f"{row[f'{name}_ms']:.1f}"
            + (f" ({row[f'{name}_peak_bytes'] / 1e9:.1f})" if row[f"{name}_peak_bytes"] else "")
            for name in ("one", "all")
        )
        lines.append(
            f"| {row['pixels']} | {one} | {row['ranks']} | {every} | {row['speedup']:.2f} | "
            f"{row['relative_error']:.1e} |"
        )
    return "\n".join(lines)


def balance(result: Row) -> str:
    """Markdown of a result of ``scan_balance.py``."""
    lines = [
        "| pixels | error as it is | balanced | error of means as it is | balanced |",
        "|---|---|---|---|---|",
    ]
    found = {(row["pixels"], row["balanced"]): row for row in result["rows"]}
    for pixels in sorted({pixels for pixels, _ in found}):
        plain, balanced = found[pixels, False], found.get((pixels, True))
        after = "(nothing to balance)" if balanced is None else f"{balanced['error']:.3f}"
        means = "(nothing to balance)" if balanced is None else f"{balanced['error_of_means']:.3f}"
        lines.append(
            f"| {pixels} | {plain['error']:.3f} | {after} | {plain['error_of_means']:.3f} | {means} |"
        )
    return "\n".join(lines)
