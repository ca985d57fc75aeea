"""Programs of the repository as modules, for tests that call them in their own process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load_script(file: str | Path, known: bool = False) -> ModuleType:
    """A file, by its path from the repository's root on, as a module of its own.

    Args:
        known: others find it by its name meanwhile, as dataclasses and the processes of a pool must.
    """
    path = (ROOT / file).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if known:
        sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
