"""The model behind the page: loads in the background, draws for one visitor at a time, stops when told."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.cli import loading, options
from gspn2_diffusion.cli.console import CliError, fast_imports
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import SIZE_STEP, DrawRequest
from gspn2_diffusion.webapp.samplers import build_scheduler
from gspn2_diffusion.webapp.waiting import Line

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn2_diffusion.png_metadata import GenerationSettings

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between two looks at the stop signal while waiting


@dataclass(frozen=True)
class Waiting:
    """Nothing is drawn yet: the model still loads, or ``before`` requests come first."""

    loading: bool
    before: int


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` denoiser calls of picture ``number`` (from 0) of ``count``."""

    number: int
    count: int
    done: int
    total: int
    seconds_left: float
    preview: Image | None


@dataclass(frozen=True)
class Finished:
    """A picture and the settings that draw it again."""

    number: int
    count: int
    picture: Image
    settings: GenerationSettings


Event = Waiting | Progress | Finished


class _Stopped(Exception):
    """The stop signal came; stays inside the drawing thread."""


@dataclass(frozen=True)
class _Loaded:
    pipe: Any
    preview: Any
    own_scheduler: Any
    template: GenerationSettings
    backend: str


class Engine:
    """One model. Every method may be called from any thread.

    Args:
        model: as in ``gspn2 generate --model``. A wrong name shows at once, as :class:`CliError`.
        device: as in ``gspn2 generate``.
        dtype: torch's name of one, or "auto".
        longest_line: requests that wait or run at once.
    """

    def __init__(self, model: str, device: str, dtype: str, longest_line: int) -> None:
        self.source = loading.find_model(model)
        self.model = loading.display_name(model)
        self._wanted = (device, dtype)
        self.line = Line(longest_line)
        self._ready = threading.Event()
        self._loaded: _Loaded | None = None

    def load_in_background(self) -> None:
        """Returns at once; :meth:`draw` waits for the model."""
        threading.Thread(target=self._load, name="gspn2-load", daemon=True).start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether loading has ended, well or not, within ``seconds``."""
        return self._ready.wait(seconds)

    def _load(self) -> None:
        started = time.monotonic()
        try:
            self._loaded = _load(self.source, self.model, *self._wanted)
            logger.info("%s is ready after %.1f s", self.model, time.monotonic() - started)
        except Exception:
            logger.exception("%s cannot be loaded", self.model)
        finally:
            self._ready.set()

    def info(self) -> dict[str, Any]:
        """What runs, for people and programs; never a path."""
        found: dict[str, Any] = {"model": self.model, "state": "loading", "waiting": len(self.line)}
        if self._ready.is_set():
            found["state"] = "ready" if self._loaded else "failed"
        if self._loaded:
            template = self._loaded.template
            found.update(
                model_hash=template.model_hash,
                device=template.device_name or template.device,
                dtype=template.dtype,
                backend=self._loaded.backend,
                versions=template.versions,
            )
        return found

    def draw(self, request: DrawRequest, stop: threading.Event) -> Generator[Event, None, None]:
        """Draws ``request.count`` pictures, one after the other; ends early once ``stop`` is set.

        A set ``stop`` takes effect after the running denoising step at the latest. Closing the iterator has
        the same effect.

        Raises:
            AppError: the line is full, the model is not there, or drawing failed.
        """
        ticket = self.line.join()
        worker: threading.Thread | None = None
        try:
            while self.line.wait(ticket, 0) > 0 or not self._ready.is_set():
                yield Waiting(not self._ready.is_set(), self.line.position(ticket))
                if stop.wait(0.05):
                    return
                if self.line.wait(ticket, _TICK) == 0:
                    self._ready.wait(_TICK)
            if self._loaded is None:
                raise AppError("The model could not be loaded; the server's log says why.")
            _check_size(self._loaded.pipe, request)
            events: queue.Queue[Event | BaseException | None] = queue.Queue()
            worker = threading.Thread(
                target=_work, args=(self._loaded, request, stop, events), name="gspn2-draw", daemon=True
            )
            worker.start()
            yield from _collect(events)
        finally:
            if worker is None:
                self.line.leave(ticket)
            else:
                stop.set()
                worker.join()  # at most the step that is running
                self.line.leave(ticket)


def _check_size(pipe: Any, request: DrawRequest) -> None:
    if request.width % pipe.size_multiple or request.height % pipe.size_multiple:
        raise AppError(f"Width and height must be multiples of {pipe.size_multiple} for this model.")


def _collect(events: queue.Queue[Event | BaseException | None]) -> Iterator[Event]:
    """Events as they come; of several progress reports that have piled up only the last one."""
    while True:
        batch = [events.get()]
        while not events.empty():
            batch.append(events.get())
        for index, event in enumerate(batch):
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            if not isinstance(event, Progress) or index == len(batch) - 1:
                yield event


def _work(loaded: _Loaded, request: DrawRequest, stop: threading.Event, events: queue.Queue[Any]) -> None:
    """The drawing thread: puts events, at the end None or the failure as :class:`AppError`."""
    import torch

    try:
        for number in range(request.count):
            events.put(_draw_one(loaded, request, number, stop, events))
    except _Stopped:
        pass
    except AppError as error:
        events.put(error)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        events.put(AppError("The device has not enough memory for this; try a smaller picture."))
    except Exception:
        logger.exception("drawing %r failed", request)
        events.put(AppError("Drawing failed; the server's log says why."))
    finally:
        events.put(None)


def _draw_one(
    loaded: _Loaded, request: DrawRequest, number: int, stop: threading.Event, events: queue.Queue[Any]
) -> Finished:
    import numpy as np
    import torch

    from gspn2_diffusion.webapp.preview import CleanEstimate

    pipe = loaded.pipe
    pipe.scheduler = build_scheduler(request.scheduler, loaded.own_scheduler)
    scheduler, config = loading.scheduler_settings(pipe)
    started, estimate = time.monotonic(), CleanEstimate()

    def after_step(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop.is_set():
            pipe._interrupt = True  # the sampling loop ends before its next step
            return {}
        done, total = step + 1, pipe.num_timesteps
        sigma = float(pipe.scheduler.timesteps[done]) / 1000 if done < total else 0.0
        clean = estimate.update(tensors["latents"][0].detach(), sigma)
        per_call = (time.monotonic() - started) / done
        left = per_call * (total - done + total * (request.count - number - 1))
        preview = loaded.preview.picture(clean) if loaded.preview and done < total else None
        events.put(Progress(number, request.count, done, total, left, preview))
        return {}

    if stop.is_set():
        raise _Stopped
    latents = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(request.seed + number),
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    if stop.is_set():
        raise _Stopped
    with torch.no_grad():
        array = pipe.decode_latents(latents, "np")
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
    )
    return Finished(number, request.count, pipe.image_processor.numpy_to_pil(array)[0], settings)


def _load(source: str, model: str, device_name: str, dtype_name: str) -> _Loaded:
    with fast_imports():
        import torch

        from gspn2_diffusion.webapp.preview import LatentPreview
    from gspn2_diffusion.cli.rendering import package_versions
    from gspn2_diffusion.files import model_hash
    from gspn2_diffusion.png_metadata import GenerationSettings

    device = options.resolve_device(device_name)
    dtype = options.resolve_dtype(dtype_name, device)
    pipe, folder = loading.load_pipeline(source, device, dtype)
    if SIZE_STEP % pipe.size_multiple and pipe.size_multiple % SIZE_STEP:
        raise CliError(f"sizes of this model are multiples of {pipe.size_multiple}, not of {SIZE_STEP}")
    template = GenerationSettings(
        prompt="",
        negative_prompt="",
        steps=0,
        guidance_scale=0.0,
        seed=0,
        height=0,
        width=0,
        model=model,
        model_hash=model_hash(folder),
        scheduler="",
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        versions=package_versions(device.type),
    )
    try:
        preview = LatentPreview.fit(pipe)
    except Exception:  # an autoencoder of another kind draws as well, only without a preview
        logger.warning("no preview for this autoencoder", exc_info=True)
        preview = None
    return _Loaded(pipe, preview, pipe.scheduler, template, _backend(device.type))


def _backend(device_type: str) -> str:
    """Which line scan runs, in words."""
    from gspn2_diffusion.ops import cupy_backend

    if device_type == "cuda" and cupy_backend.availability()[0]:
        return "CUDA kernels (CuPy)"
    return "plain torch"
