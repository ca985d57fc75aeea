"""Writes the result of benchmarks/denoiser.py into docs/diffusers-compatibility.md, which names its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "diffusers-compatibility.md"
END = "<!-- end of the measurements -->"


def render(result: dict[str, Any]) -> str:
    """A result of benchmarks/denoiser.py in Markdown."""
    lines = [
        f"{result['gpu']}, torch {result['torch']}, {result['parameters'] / 1e9:.2f}B parameters, bfloat16."
    ]
    lines += ["", "| batch | eager | blocks compiled | whole compiled | compiled blocks as a CUDA graph |"]
    lines += ["|---|---|---|---|---|"]
    for batch, row in result["speed"].items():
        whole = f"{row['whole_ms']:.1f} ms ({row['whole_speedup']:.2f}x)" if "whole_ms" in row else "-"
        blocks = f"{row['blocks_ms']:.1f} ms ({row['blocks_speedup']:.2f}x)"
        graph = f"{row['blocks_cuda_graph_ms']:.1f} ms" if "blocks_cuda_graph_ms" in row else "-"
        lines.append(f"| {batch.split()[-1]} | {row['eager_ms']:.1f} ms | {blocks} | {whole} | {graph} |")
    lines += [
        "",
        "| | peak, denoising | less | peak, with decoding | time of both calls |",
        "|---|---|---|---|---|",
    ]
    plain = result["memory"].get("plain", {}).get("denoising_peak_bytes")
    for name, row in result["memory"].items():
        peak, picture = row["denoising_peak_bytes"], row["picture_peak_bytes"]
        if peak is None:
            continue
        seconds = row["denoising_s"] + row["picture_s"]
        less = "" if name == "plain" or not plain else f"{1 - peak / plain:.0%}"
        lines.append(f"| {name} | {peak / 1e9:.2f} GB | {less} | {picture / 1e9:.2f} GB | {seconds:.2f} s |")
    return "\n".join(lines)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    begin = re.search(r"<!-- measured: (\S+) -->\n", text)
    if begin is None:
        raise SystemExit(f"{DOCUMENT} names no result file")
    result = json.loads((ROOT / begin.group(1)).read_text(encoding="utf-8"))
    rest = text[begin.end() :].split(END)[1]
    temporary = DOCUMENT.with_suffix(".tmp")
    temporary.write_text(f"{text[: begin.end()]}{render(result)}\n{END}{rest}", encoding="utf-8")
    temporary.replace(DOCUMENT)


if __name__ == "__main__":
    main()
