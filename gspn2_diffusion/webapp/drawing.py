"""A loaded model, and one picture drawn with it: from text, from a picture, or a part of one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.cli import loading, options
from gspn2_diffusion.cli.adapters import LoraSwitch
from gspn2_diffusion.cli.console import CliError, fast_imports
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import SIZE_STEP, DrawRequest
from gspn2_diffusion.webapp.samplers import build_scheduler
from gspn2_diffusion.webapp.shelf import Shelf

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn2_diffusion.png_metadata import GenerationSettings
    from gspn2_diffusion.webapp.propagation import Recorder

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The stop signal came; stays inside the drawing thread."""


@dataclass(frozen=True)
class Loaded:
    """A model on its device. ``pipes``, one for each :attr:`DrawRequest.task`, share their components."""

    name: str
    pipes: dict[str, Any]
    preview: Any
    own_scheduler: Any
    template: GenerationSettings
    backend: str
    switch: LoraSwitch

    @property
    def pipe(self) -> Any:
        return self.pipes["text"]


@dataclass(frozen=True)
class Step:
    """After ``done`` of ``total`` denoiser calls; ``preview`` shows where it is heading."""

    done: int
    total: int
    seconds: float
    preview: Image | None


def load(shelf: Shelf, name: str, device_name: str, dtype_name: str) -> Loaded:
    """The model ``name`` of ``shelf``.

    Raises:
        CliError: it cannot be loaded.
    """
    with fast_imports():
        import torch

        from gspn2_diffusion.webapp.preview import LatentPreview
    from gspn2_diffusion.cli.rendering import common_settings
    from gspn2_diffusion.png_metadata import GenerationSettings

    device = options.resolve_device(device_name)
    dtype = options.resolve_dtype(dtype_name, device)
    pipe, folder = loading.load_pipeline(shelf.models[name], device, dtype)
    if SIZE_STEP % pipe.size_multiple and pipe.size_multiple % SIZE_STEP:
        raise CliError(f"sizes of this model are multiples of {pipe.size_multiple}, not of {SIZE_STEP}")
    blank: dict[str, Any] = {"prompt": "", "negative_prompt": ""}
    blank |= dict.fromkeys(("steps", "guidance_scale", "seed", "height", "width"), 0)
    template = GenerationSettings(**blank, **common_settings(pipe, folder, name, device, dtype))
    try:
        preview = LatentPreview.fit(pipe)
    except Exception:  # an autoencoder of another kind draws as well, only without a preview
        logger.warning("no preview for this autoencoder", exc_info=True)
        preview = None
    del torch
    return Loaded(
        name, _pipes(pipe), preview, pipe.scheduler, template, _backend(device.type),
        LoraSwitch(pipe, shelf.loras.values()),
    )  # fmt: skip


def _pipes(pipe: Any) -> dict[str, Any]:
    from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline
    from gspn2_diffusion.pipelines.pipeline_gspn2_superres import GSPN2SuperResPipeline

    found = {"text": pipe}
    kinds: dict[str, Any] = {"img2img": GSPN2Img2ImgPipeline, "inpaint": GSPN2InpaintPipeline}
    kinds["enlarge"] = GSPN2SuperResPipeline
    kept = {name: pipe.config[name] for name in ("max_sequence_length", "balance_scans")}
    for task, kind in kinds.items():
        found[task] = kind(**pipe.components, **kept)
        found[task].set_progress_bar_config(disable=True)
    return found


def _backend(device_type: str) -> str:
    """Which line scan runs, in words."""
    from gspn2_diffusion.ops import cupy_backend

    if device_type == "cuda" and cupy_backend.availability()[0]:
        return "CUDA kernels (CuPy)"
    return "plain torch"


def draw_one(
    loaded: Loaded,
    shelf: Shelf,
    request: DrawRequest,
    number: int,
    stop: threading.Event,
    on_step: Callable[[Step], None],
    recorder: Recorder | None = None,
) -> tuple[Image, GenerationSettings]:
    """Picture ``number`` (from 0) of a request, and the settings that draw it again.

    Args:
        on_step: called after every denoiser call.
        recorder: looks into the denoiser meanwhile.

    Raises:
        Stopped: ``stop`` was set.
        AppError: the LoRA does not fit, or the picture has values that are not numbers.
    """
    import numpy as np
    import torch

    if stop.is_set():
        raise Stopped
    loras = switch_adapters(loaded, shelf, request)
    pipe = loaded.pipes[request.task]
    pipe.scheduler = build_scheduler(request.scheduler, loaded.own_scheduler)
    scheduler, config = loading.scheduler_settings(pipe)
    whole = request.task in ("inpaint", "enlarge")  # these do more than to decode
    with recorder.watch(pipe.transformer) if recorder else contextlib.nullcontext():
        result = pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            height=request.height,
            width=request.width,
            generator=torch.Generator("cpu").manual_seed(request.seed + number),
            callback_on_step_end=_callback(loaded, stop, on_step),
            # Latents, where they are enough, so that a stop also saves their decoding.
            output_type="np" if whole else "latent",
            **_picture_inputs(request),
        ).images
    if stop.is_set():
        raise Stopped
    with torch.no_grad():
        array = result if whole else pipe.decode_latents(result, "np")
    if not np.isfinite(array).all():
        raise AppError("The picture has values that are not numbers; the server should use another --dtype.")
    settings = dataclasses.replace(
        loaded.template,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        seed=request.seed + number,
        height=request.height,
        width=request.width,
        scheduler=scheduler,
        scheduler_config=config,
        loras=loras,
        few_steps=request.few_steps,
        source=_source(request),
    )
    return pipe.image_processor.numpy_to_pil(array)[0], settings


def switch_adapters(loaded: Loaded, shelf: Shelf, request: DrawRequest) -> list[dict[str, Any]]:
    """Makes the model use the request's LoRA and few steps, or none; returns what settings record of LoRAs.

    Raises:
        AppError: it does not fit the model.
    """
    loras = [shelf.loras[request.lora].used(request.lora_weight)] if request.lora else []
    try:
        loaded.switch.use(loras, request.few_steps)
    except ValueError:
        logger.exception("%s or few steps cannot be used", request.lora or "no LoRA")
        what = f"The LoRA {request.lora}" if request.lora else "The few-step adapter"
        raise AppError(f"{what} does not fit this model.") from None
    return loras


def _callback(loaded: Loaded, stop: threading.Event, on_step: Callable[[Step], None]) -> Callable[..., Any]:
    from gspn2_diffusion.webapp.preview import CleanEstimate

    started, estimate = time.monotonic(), CleanEstimate()

    def after_step(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop.is_set():
            pipe._interrupt = True  # the sampling loop ends before its next step
            return {}
        done, total = step + 1, pipe.num_timesteps
        schedule = pipe.scheduler.timesteps
        sigma = float(schedule[len(schedule) - total + done]) / 1000 if done < total else 0.0
        clean = estimate.update(tensors["latents"][0].detach(), sigma)
        preview = loaded.preview.picture(clean) if loaded.preview and done < total else None
        on_step(Step(done, total, time.monotonic() - started, preview))
        return {}

    return after_step


def _picture_inputs(request: DrawRequest) -> dict[str, Any]:
    if request.picture is None:
        return {}
    inputs: dict[str, Any] = {"image": request.picture, "strength": request.strength}
    return inputs if request.mask is None else {**inputs, "mask_image": request.mask}


def _source(request: DrawRequest) -> dict[str, Any]:
    """What a picture records of the one that it was drawn from."""
    if request.picture is None:
        return {}
    found: dict[str, Any] = {"task": request.task, "strength": request.strength}
    for name, picture in (("image", request.picture), ("mask", request.mask)):
        if picture is not None:
            found[f"{name}_sha256"] = hashlib.sha256(picture.tobytes()).hexdigest()
    return found
