"""Pipelines: prompts in, pictures out. Installed as ``gspn2_diffusion.pipelines``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "GSPN2Pipeline": "gspn2_diffusion.pipelines.pipeline_gspn2",
    "GSPN2PipelineOutput": "gspn2_diffusion.pipelines.pipeline_output",
}

__all__ = ["GSPN2Pipeline", "GSPN2PipelineOutput"]

if TYPE_CHECKING:
    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
