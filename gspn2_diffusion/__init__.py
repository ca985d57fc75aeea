"""Text-to-image diffusion on a GSPN-2 backbone (arXiv 2512.07884).

Names are imported on first use, so ``import gspn2_diffusion`` costs little and needs neither CuPy nor a GPU.
"""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "line_scan": "gspn2_diffusion.ops.line_scan",
    "GSPN2Mixer": "gspn2_diffusion.layers.mixer",
    "GSPN2Transformer2DModel": "gspn2_diffusion.models.transformer_gspn2",
    "GSPN2Pipeline": "gspn2_diffusion.pipelines.pipeline_gspn2",
    "GSPN2Img2ImgPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_img2img",
    "GSPN2InpaintPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_inpaint",
    "GSPN2SuperResPipeline": "gspn2_diffusion.pipelines.pipeline_gspn2_superres",
    "GSPN2PipelineOutput": "gspn2_diffusion.pipelines.pipeline_output",
    "convert_to_gspn2": "gspn2_diffusion.conversion.convert",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from gspn2_diffusion.conversion.convert import convert_to_gspn2
    from gspn2_diffusion.layers.mixer import GSPN2Mixer
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
    from gspn2_diffusion.ops.line_scan import line_scan
    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_superres import GSPN2SuperResPipeline
    from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value  # later look-ups skip this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# In a plain checkout pipelines/ stands beside this package instead of inside it.
_here = os.path.dirname(os.path.abspath(__file__))
_beside = os.path.dirname(_here)
if not os.path.isdir(os.path.join(_here, "pipelines")) and os.path.isfile(
    os.path.join(_beside, "pipelines", "pipeline_gspn2.py")
):
    __path__.append(_beside)

# Once this package is imported, diffusers finds our classes of saved converted models (it looks in loaded
# modules), and its AutoPipeline classes find our pipelines; costs no import of theirs.
from gspn2_diffusion import conversion as _conversion  # noqa: E402
from gspn2_diffusion.pipelines import auto_pipelines as _auto_pipelines  # noqa: E402
