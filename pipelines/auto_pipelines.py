"""Makes diffusers' ``AutoPipelineFor...`` find the GSPN-2 pipelines.

diffusers has no registration, only a mapping per task in a module that imports all its pipelines, which takes
seconds. So that module is not imported here: an import hook fills its mappings once somebody else does.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

MODULE = "diffusers.pipelines.auto_pipeline"
FAMILY = "gspn2"
TASKS = {
    "AUTO_TEXT2IMAGE_PIPELINES_MAPPING": "GSPN2Pipeline",
    "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING": "GSPN2Img2ImgPipeline",
    "AUTO_INPAINT_PIPELINES_MAPPING": "GSPN2InpaintPipeline",
}

logger = logging.getLogger(__name__)


def register() -> None:
    """Adds the pipelines to diffusers' mappings, now or as soon as their module is imported."""
    if (module := sys.modules.get(MODULE)) is not None and hasattr(module, "SUPPORTED_TASKS_MAPPINGS"):
        fill_mappings(module)
    elif not any(isinstance(finder, _AutoPipelineFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoPipelineFinder())


def fill_mappings(module: ModuleType) -> None:
    """Adds the pipelines to the mappings of ``auto_pipeline``; a version without one is left as it is."""
    pipelines = importlib.import_module("gspn2_diffusion.pipelines")
    for mapping, name in TASKS.items():
        if hasattr(module, mapping):
            getattr(module, mapping)[FAMILY] = getattr(pipelines, name)
        else:
            logger.warning("diffusers has no %s here; AutoPipeline does not know %s", mapping, name)
    _read_class_names_of_folders(module)


def _read_class_names_of_folders(module: ModuleType) -> None:
    """A folder with its own pipeline file has [file, class] where diffusers looks up the name of a class."""
    look_up = getattr(module, "_get_model", None)
    if look_up is None or getattr(look_up, "reads_lists", False):
        return

    def get_model(class_name: Any) -> Any:
        return look_up(class_name[-1] if isinstance(class_name, (list, tuple)) else class_name)

    get_model.reads_lists = True  # type: ignore[attr-defined]
    module._get_model = get_model  # type: ignore[attr-defined]


class _AutoPipelineFinder(importlib.abc.MetaPathFinder):
    """Finds one module, as the other finders do, and fills its mappings after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _FillingLoader(spec.loader)
        return spec


class _FillingLoader(importlib.abc.Loader):
    """Another loader, followed by :func:`fill_mappings`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        fill_mappings(module)

    def __getattr__(self, name: str) -> Any:  # get_source, get_resource_reader, ...
        return getattr(self.loader, name)
