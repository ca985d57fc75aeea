"""Pipelines: prompts in, pictures out. Installed as ``gspn2_diffusion.pipelines``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.pipelines import auto_pipelines

_EXPORTS = {
    "GSPN2Pipeline": "gspn2_diffusion.pipelines.pipeline_gspn2",
    "GSPN2Img2ImgPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_img2img",
    "GSPN2InpaintPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_inpaint",
    "GSPN2SuperResPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_superres",
    "GSPN2PipelineOutput": "gspn2_diffusion.pipelines.pipeline_output",
}

__all__ = [
    "GSPN2Img2ImgPipeline",
    "GSPN2InpaintPipeline",
    "GSPN2Pipeline",
    "GSPN2PipelineOutput",
    "GSPN2SuperResPipeline",
]

if TYPE_CHECKING:
    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_superres import GSPN2SuperResPipeline
    from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


auto_pipelines.register()  # last: it may need the names above
