"""Writes result files into the documents that show them; no number in them is typed by hand.

    python benchmarks/render.py           write
    python benchmarks/render.py --check   exit with 1 where a document is not what it would be written to

A document names a file between two comments: ``<!-- measured: benchmarks/results/NAME.json -->`` and
``<!-- end of the measurements -->``. The name's beginning says what kind of table it is. The plots beside the
result files are drawn from them, too.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import block_report
import card_report
import denoiser_table
import model_report
import profile_report
import scan_report
import size_report
import training_report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "Not measured yet."
MARKED = re.compile(r"(<!-- measured: (\S+) -->\n)(.*?)(<!-- end of the measurements -->)", re.DOTALL)


PLOTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "line_scan-": scan_report.svg,
    "models-": model_report.svg,
}


def _plot_name(prefix: str, result: dict[str, Any]) -> str:
    return f"{prefix}{result['gpu'].replace(' ', '-').lower()}.svg"


def models(result: dict[str, Any]) -> str:
    """The plot beside the result, and the table."""
    plot = f"![time by size](../benchmarks/results/{_plot_name('models-', result)})"
    return f"{plot}\n\n{model_report.render(result)}"


def line_scan(result: dict[str, Any]) -> str:
    """The plots beside the result, and the tables."""
    plot = f"![time by size and share of the copy bandwidth](results/{_plot_name('line_scan-', result)})"
    return f"{plot}\n\n{scan_report.render(result)}"


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "line_scan-": line_scan,
    "block_kernels-": block_report.render,
    "profile-": profile_report.render,
    "scan_reads-": scan_report.reads,
    "training-": training_report.render,
    "distillation-": training_report.distillation,
    "models-": models,
    "high-resolution-": size_report.sizes,
    "several-gpus-": size_report.several_gpus,
    "scan-balance": size_report.balance,
    "denoiser-": denoiser_table.render,
}


FOLDER_RENDERERS: dict[str, Callable[[Path], str]] = {  # of a file and those beside it
    "evaluation-": card_report.render,
}


def rendered(text: str, root: Path = ROOT) -> str:
    """A document with every marked part written anew; parts of kinds that are not known here stay."""

    def replace(found: re.Match[str]) -> str:
        begin, name, _, end = found.groups()
        path = root / name
        known = [prefix for prefix in (*RENDERERS, *FOLDER_RENDERERS) if path.name.startswith(prefix)]
        if not known:
            return found.group()
        if not path.is_file():
            return f"{begin}{MISSING}\n{end}"
        if known[0] in FOLDER_RENDERERS:
            return f"{begin}{FOLDER_RENDERERS[known[0]](path)}\n{end}"
        return f"{begin}{RENDERERS[known[0]](json.loads(path.read_text(encoding='utf-8')))}\n{end}"

    return MARKED.sub(replace, text)


def plots(folder: Path = RESULTS) -> dict[Path, str]:
    """The plots of a folder's result files, by where they lie."""
    return {
        path.with_suffix(".svg"): draw(json.loads(path.read_text(encoding="utf-8")))
        for prefix, draw in PLOTS.items()
        for path in sorted(folder.glob(f"{prefix}*.json"))
    }


def main(argv: list[str]) -> int:
    """Write or check every document and plot; 1 if any was not up to date when checking."""
    cards = sorted((ROOT / "gspn2_diffusion" / "checkpoints").glob("*/README.md"))
    documents = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md", *cards]
    wanted = {path: rendered(path.read_text(encoding="utf-8")) for path in documents} | plots()
    check = "--check" in argv
    stale = {
        path: fresh
        for path, fresh in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != fresh
    }
    for path, fresh in stale.items():
        print(f"{path.relative_to(ROOT)}: {'not up to date' if check else 'written'}")
        if not check:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(fresh, encoding="utf-8")
            temporary.replace(path)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
