"""Writes the signatures and docstrings of the public names into docs/api.md, below its examples.

python scripts/render_api.py            # --check only says whether the file is up to date
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
BEGIN = "<!-- written by scripts/render_api.py -->"
# Where to import a name from, the name, and those of its methods that are described as well.
PUBLIC: list[tuple[str, str, list[str]]] = [
    (
        "gspn2_diffusion",
        "GSPN2Pipeline",
        [
            "__call__",
            "encode_prompt",
            "from_pretrained",
            "save_pretrained",
            "load_lora_weights",
            "save_lora_weights",
            "set_adapters",
            "fuse_lora",
            "enable_few_steps",
            "disable_few_steps",
            "add_few_steps",
        ],
    ),
    ("gspn2_diffusion", "GSPN2Img2ImgPipeline", ["__call__"]),
    ("gspn2_diffusion", "GSPN2InpaintPipeline", ["__call__"]),
    ("gspn2_diffusion", "GSPN2PipelineOutput", []),
    ("gspn2_diffusion", "GSPN2Transformer2DModel", ["forward", "enable_cache", "set_scan_backend"]),
    ("gspn2_diffusion.models.initialization", "initialize_for_training", []),
    ("gspn2_diffusion", "GSPN2Mixer", ["forward", "reset_parameters"]),
    ("gspn2_diffusion", "line_scan", []),
]
_SECTIONS = ("Args", "Returns", "Raises", "Attributes")


def markdown(docstring: str) -> str:
    """A docstring in Google's style as Markdown: its sections become lists."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", inspect.cleandoc(docstring).replace("``", "`"))
    lines: list[str] = []
    section, code = "", False
    for line in text.splitlines():
        name = line.rstrip(":")
        if line.endswith(":") and name in _SECTIONS:
            section = name
            lines += [f"**{name}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            lines.append(_item(line.strip(), section))
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            indented = line.startswith("    ")
            if indented != code and (indented or line.strip()):
                lines.append("```text" if indented else "```")
                code = indented
            section = section if not line.strip() else ""
            lines.append(line.removeprefix("    ") if code else line)
    return "\n".join([*lines, "```"] if code else lines).strip()


def _item(line: str, section: str) -> str:
    """One argument or error: its names stand before the first colon."""
    names, colon, rest = line.partition(": ")
    if section == "Returns" or not colon:
        return line
    return f"- {', '.join(f'`{name.strip()}`' for name in names.split(','))}: {rest}"


def signature(function: Any) -> str:
    """The arguments without the first (self, cls), wrapped, and what is returned."""
    found = inspect.signature(function)
    parts: list[str] = []
    for name, parameter in found.parameters.items():
        if name in ("self", "self_or_cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{star}{name}: {parameter.annotation}{default}")
    result = "" if found.return_annotation in (found.empty, "None") else f" -> {found.return_annotation}"
    # Wrapped between arguments only.
    glued = [part.replace(" ", "\0") for part in parts]
    body = textwrap.fill(", ".join(glued), 100, break_long_words=False, break_on_hyphens=False)
    return (
        "(\n" + textwrap.indent(body.replace("\0", " "), "    ") + f"\n){result}" if parts else f"(){result}"
    )


def describe(module: str, name: str, methods: list[str]) -> list[str]:
    """Heading, signature and docstring of a name and its methods."""
    value = getattr(importlib.import_module(module), name)
    is_class = inspect.isclass(value)
    lines = [f"### {name}", "", f"`from {module} import {name}`", ""]
    if not (is_class and "__call__" in methods):
        lines += ["```text", f"{name}{signature(value)}", "```", ""]
    lines += [markdown(value.__doc__ or ""), ""]
    for method in methods:
        function = getattr(value, method)
        shown = "pipe" if method == "__call__" else f"{name}.{method}"
        lines += [f"#### {name}.{method}", "", "```text", f"{shown}{signature(function)}", "```", ""]
        lines += [markdown(function.__doc__ or ""), ""]
    return lines


def render() -> str:
    """The part of the document below :data:`BEGIN`."""
    lines = ["", "## Reference", ""]
    for module, name, methods in PUBLIC:
        lines += describe(module, name, methods)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    options = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    new = text.split(BEGIN)[0] + BEGIN + "\n" + render()
    if options.check:
        sys.exit(f"{DOCUMENT} is out of date: run scripts/render_api.py" if new != text else 0)
    temporary = DOCUMENT.with_suffix(".tmp")
    temporary.write_text(new, encoding="utf-8")
    temporary.replace(DOCUMENT)


if __name__ == "__main__":
    main()
