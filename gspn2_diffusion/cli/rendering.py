"""Drawing with resolved settings: one code path for every command that must draw the same picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion import __version__

if TYPE_CHECKING:
    import torch
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


def common_settings(
    pipe: GSPN2Pipeline, folder: Path, model: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The part of :class:`GenerationSettings` that is the same for all pictures of a loaded pipeline.

    Args:
        folder: where it was loaded from; decides ``model_hash``.
        model: the name to record.
    """
    import torch

    from gspn2_diffusion.cli.loading import scheduler_settings
    from gspn2_diffusion.files import model_hash

    scheduler, config = scheduler_settings(pipe)
    return {
        "model": model,
        "model_hash": model_hash(folder),
        "scheduler": scheduler,
        "scheduler_config": config,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "versions": package_versions(device.type),
    }


class Drawn:
    """Pictures on their way from the device: the next ones can be started before these have arrived.

    Args:
        pixels: ``(B, 3, H, W)`` floats in [0, 1], possibly still being computed.
        started: when drawing began, as :func:`mark` returned it.
    """

    def __init__(self, pixels: torch.Tensor, started: Any) -> None:
        import torch

        finite = pixels.isfinite().flatten(1).all(1)  # (B,)
        # Rounds as diffusers' `VaeImageProcessor.numpy_to_pil` does.
        codes = (pixels.float().nan_to_num() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        self.finite, self._codes = _to_cpu(finite), _to_cpu(codes.contiguous())
        self._started, self._ended = started, mark(pixels.device)

    def __len__(self) -> int:
        return len(self.finite)

    def seconds(self) -> float:
        """How long the device has worked on them; waits until they are there."""
        if isinstance(self._ended, float):
            return self._ended - self._started
        self._ended.synchronize()
        return self._started.elapsed_time(self._ended) / 1000

    def images(self) -> list[Image | None]:
        """The pictures, None for those with values that are not numbers; waits until they are there."""
        from PIL import Image

        self.seconds()
        codes, finite = self._codes.numpy(), self.finite.tolist()
        return [Image.fromarray(code) if good else None for code, good in zip(codes, finite, strict=True)]


def mark(device: torch.device) -> Any:
    """This moment in the device's work: a CUDA event, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU; from a GPU without waiting for it."""
    import torch

    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def draw_batch(
    pipe: GSPN2Pipeline, settings: Sequence[GenerationSettings], on_step: Callable[[int], None] | None = None
) -> Drawn:
    """Pictures that share size, steps, guidance and LoRAs, in one call of the pipeline.

    Args:
        pipe: on its device, in its dtype, with its adapters switched.
        settings: B of them; ``seed`` seeds a CPU generator of its own for each picture, so that every device
            and every neighbour leaves it the same noise.
        on_step: called with the number of finished steps.
    """
    import torch

    def after_step(_pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(step + 1)
        return kwargs

    first, started = settings[0], mark(pipe.device)
    pixels = pipe(
        [item.prompt for item in settings],
        negative_prompt=[item.negative_prompt for item in settings],
        num_inference_steps=first.steps,
        guidance_scale=first.guidance_scale,
        height=first.height,
        width=first.width,
        generator=[torch.Generator("cpu").manual_seed(item.seed) for item in settings],
        output_type="pt",
        callback_on_step_end=after_step,
    ).images
    return Drawn(pixels, started)
