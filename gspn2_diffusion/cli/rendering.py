"""Drawing with resolved settings: one code path for every command that must draw the same picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gspn2_diffusion import __version__

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.png_metadata import GenerationSettings


def package_versions(device_type: str) -> dict[str, str]:
    """Versions of what takes part in drawing on such a device."""
    names = ["torch", "diffusers", "transformers"]
    versions = {"gspn2-diffusion": __version__, **{name: importlib.metadata.version(name) for name in names}}
    if device_type == "cuda":
        for name in ("cupy-cuda13x", "cupy-cuda12x"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions["cupy"] = importlib.metadata.version(name)
    return versions


def draw_batch(
    pipe: GSPN2Pipeline, settings: Sequence[GenerationSettings], on_step: Callable[[int], None] | None = None
) -> np.ndarray:
    """Pictures that share size, steps and guidance, in one call of the pipeline.

    Args:
        pipe: on its device, in its dtype.
        settings: B of them; ``seed`` seeds a CPU generator of its own for each picture, so that every device
            and every neighbour leaves it the same noise.
        on_step: called with the number of finished steps.

    Returns:
        ``(B, H, W, 3)`` float32 in [0, 1]; a picture that went wrong has values that are not numbers.
    """
    import torch

    def after_step(_pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return kwargs

    first = settings[0]
    return pipe(
        [item.prompt for item in settings],
        negative_prompt=[item.negative_prompt for item in settings],
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        height=first.height,
        width=first.width,
        generator=[torch.Generator("cpu").manual_seed(item.seed) for item in settings],
        output_type="np",
        callback_on_step_end=after_step,
    ).images


def to_image(pixels: np.ndarray) -> Image | None:
    """One picture ``(H, W, 3)`` of :func:`draw_batch`; None if it has values that are not numbers.

    Rounds as diffusers' ``VaeImageProcessor.numpy_to_pil`` does.
    """
    import numpy as np
    from PIL import Image

    if not np.isfinite(pixels).all():
        return None
    return Image.fromarray((pixels * 255).round().astype("uint8"))
