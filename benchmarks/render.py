"""Writes result files into the documents that show them; no number in them is typed by hand.

    python benchmarks/render.py           write
    python benchmarks/render.py --check   exit with 1 where a document is not what it would be written to

A document names a file between two comments: ``<!-- measured: benchmarks/results/NAME.json -->`` and
``<!-- end of the measurements -->``. The name's beginning says what kind of table it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_report
import denoiser_table
import model_report
import profile_report
import scan_report
import size_report
import training_report

ROOT = Path(__file__).parents[1]
MISSING = "Not measured yet."
MARKED = re.compile(r"(<!-- measured: (\S+) -->\n)(.*?)(<!-- end of the measurements -->)", re.DOTALL)


def models(result: dict[str, Any]) -> str:
    """The table and the plot that ``models.py`` drew beside its result."""
    name = f"models-{result['gpu'].replace(' ', '-').lower()}"
    plot = f"![time by size](../benchmarks/results/{name}.svg)"
    shown = [plot, ""] if (ROOT / "benchmarks" / "results" / f"{name}.svg").is_file() else []
    return "\n".join([*shown, model_report.render(result)])


def line_scan(result: dict[str, Any]) -> str:
    """The plots that ``line_scan.py`` drew beside its result, and the tables."""
    name = f"line_scan-{result['gpu'].replace(' ', '-').lower()}.svg"
    drawn = (ROOT / "benchmarks" / "results" / name).is_file()
    plot = f"![time by size and share of the copy bandwidth](results/{name})\n\n" if drawn else ""
    return plot + scan_report.render(result)


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "line_scan-": line_scan,
    "block_kernels-": block_report.render,
    "profile-": profile_report.render,
    "training-": training_report.render,
    "distillation-": training_report.distillation,
    "models-": models,
    "high-resolution-": size_report.sizes,
    "several-gpus-": size_report.several_gpus,
    "scan-balance": size_report.balance,
    "denoiser-": denoiser_table.render,
}


def rendered(text: str, root: Path = ROOT) -> str:
    """A document with every marked part written anew; parts of kinds that are not known here stay."""

    def replace(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        known = [make for prefix, make in RENDERERS.items() if Path(name).name.startswith(prefix)]
        if not known:
            return found.group()
        path = root / name
        if not path.is_file():
            return f"{begin}{MISSING}\n{end}"
        return f"{begin}{known[0](json.loads(path.read_text(encoding='utf-8')))}\n{end}"

    return MARKED.sub(replace, text)


def main(argv: list[str]) -> int:
    """Write or check every document; the number of those that were not up to date when checking."""
    stale = 0
    for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]:
        text = path.read_text(encoding="utf-8")
        fresh = rendered(text)
        if fresh == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'not up to date' if '--check' in argv else 'written'}")
        if "--check" in argv:
            stale += 1
            continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text(fresh, encoding="utf-8")
        temporary.replace(path)
    return min(stale, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
