"""The documents about diffusers and the API: examples that run, tests that exist, tables that are current."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import feature_table
import pytest
from script_modules import load_script

import gspn2_diffusion

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
COMPATIBILITY = DOCS / "diffusers-compatibility.md"


def test_every_test_that_the_document_names_exists() -> None:
    text = COMPATIBILITY.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 120
    functions: dict[str, set[str]] = {}
    for file, name in named:
        if file not in functions:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions[file], f"{file}::{name}"
    assert len(re.findall(r"`tests/[^`]*::", text)) == len(named)  # none that the pattern does not read


def test_feature_table_is_what_diffusers_and_our_tests_say() -> None:
    text = COMPATIBILITY.read_text(encoding="utf-8")
    table = text.split(feature_table.BEGIN)[1].split(feature_table.END)[0].strip()
    assert table == feature_table.render(), "run python tests/pipelines/feature_table.py"
    rows = [row for group in feature_table.FEATURES.values() for row in group]
    assert max(Counter(feature for feature, _, _ in rows).values()) == 1
    assert sum(test is None for _, _, test in rows) == 2  # single files and IP-Adapter
    flux = next(peer for peer in feature_table.PEERS if peer.name == "Flux")
    assert feature_table.cache(flux)
    assert feature_table.lora(flux)
    pixart = next(peer for peer in feature_table.PEERS if peer.name == "PixArt-Sigma")
    assert not feature_table.lora(pixart)


def test_measurements_are_those_of_the_result_file() -> None:
    text = COMPATIBILITY.read_text(encoding="utf-8")
    table = load_script("benchmarks/denoiser_table.py")
    begin = re.search(r"<!-- measured: (\S+) -->\n", text)
    assert begin is not None
    written = text[begin.end() :].split(table.END)[0].strip()
    result = ROOT / begin.group(1)
    if result.is_file():
        measured = json.loads(result.read_text(encoding="utf-8"))
        assert written == table.render(measured), "run python benchmarks/denoiser_table.py"
    else:
        assert written == "Not measured yet."


def test_the_package_is_typed() -> None:
    folder = Path(gspn2_diffusion.__file__).parent
    assert (folder / "py.typed").is_file()
    unknown = []
    for module, name, methods in load_script("scripts/render_api.py").PUBLIC:
        value = getattr(importlib.import_module(module), name)
        functions = [getattr(value, method) for method in methods] if methods else [value]
        for function in functions:
            if not isinstance(function, type) and "return" not in function.__annotations__:
                unknown.append(f"{name}.{function.__name__}")
    assert unknown == []


def test_api_reference_is_what_the_docstrings_say() -> None:
    api = load_script("scripts/render_api.py")
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    head, reference = text.split(api.BEGIN)
    assert reference.lstrip("\n") == api.render().lstrip("\n"), "run python scripts/render_api.py"
    for _, name, _ in api.PUBLIC:
        assert f"### {name}\n" in reference
        assert name in head, f"no example has {name}"


def blocks() -> list[str]:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.slow
def test_examples_of_the_api_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one namespace, as a reader would run them."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    # diffusers copies a loaded folder's code into its cache; not into the user's.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace: dict[str, Any] = {"__name__": "examples"}
    found = blocks()
    assert len(found) >= 10
    for number, block in enumerate(found):
        exec(compile(block, f"docs/api.md, example {number}", "exec"), namespace)
    assert {"apple.png", "my-lora", "my-model"} <= {path.name for path in tmp_path.iterdir()}
    assert namespace["pipe"].current_timestep is None
