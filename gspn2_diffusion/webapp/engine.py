"""The models behind the page: one is loaded, draws for one visitor at a time, and stops when told."""

from __future__ import annotations

import collections
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.webapp import drawing
from gspn2_diffusion.webapp.drawing import Loaded, Step, Stopped
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import DrawRequest
from gspn2_diffusion.webapp.shelf import Shelf
from gspn2_diffusion.webapp.waiting import Line
from gspn2_diffusion.webapp.worker import Worker

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn2_diffusion.png_metadata import GenerationSettings
    from gspn2_diffusion.webapp.propagation import Influence, Recorder

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between two looks at the stop signal while waiting
_RECORDS = 2  # recorded drawings that are kept for the next look into them
_RECORD_BYTES = 64_000_000  # of one of them; a larger one keeps a single step


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


@dataclass(frozen=True)
class Looked:
    """What a point sends in layer ``layer`` (from 0) at denoiser call ``call`` (from 0) of ``calls``."""

    influence: Influence
    layer: int
    call: int
    calls: int


Event = Waiting | Progress | Finished | Looked
Put = Callable[[Event], None]


class Engine:
    """The models of a shelf, of which one is loaded. Every method may be called from any thread.

    Args:
        shelf: what may be asked for; its first model is loaded first.
        device: as in ``gspn2 generate``.
        dtype: torch's name of one, or "auto".
        longest_line: requests that wait or run at once.
    """

    def __init__(self, shelf: Shelf, device: str, dtype: str, longest_line: int) -> None:
        self.shelf = shelf
        self._wanted = (device, dtype)
        self.line = Line(longest_line)
        self._worker = Worker("gspn2-draw")
        self._ready = threading.Event()
        self._loaded: Loaded | None = None
        # Touched only by who is first in the line.
        self._recorded: collections.OrderedDict[Any, tuple[DrawRequest, Recorder]] = collections.OrderedDict()

    def load_in_background(self) -> None:
        """Loads the first model and returns at once; :meth:`draw` waits for it."""
        self._worker.submit(self._load_first)

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the first loading has ended, well or not, within ``seconds``."""
        return self._ready.wait(seconds)

    def close(self) -> None:
        """Waits for what runs, such as the first loading, and ends the drawing thread."""
        if not self._ready.is_set():
            logger.info("ends when %s is loaded; Ctrl+C once more does not wait", self.shelf.first)
        self._worker.close()

    def _load_first(self) -> None:
        try:
            self._load(self.shelf.first)
        except AppError:
            pass  # logged; whoever asks for this model next starts another try
        finally:
            self._ready.set()

    def _load(self, name: str) -> Loaded:
        """Puts the model ``name`` in the place of the loaded one."""
        started = time.monotonic()
        self._loaded = None
        self._recorded.clear()
        gc.collect()
        try:
            self._loaded = drawing.load(self.shelf, name, *self._wanted)
        except Exception:
            logger.exception("%s cannot be loaded", name)
            raise AppError(f"The model {name} could not be loaded; the server's log says why.") from None
        logger.info("%s is ready after %.1f s", name, time.monotonic() - started)
        return self._loaded

    def draws_on_cpu(self) -> bool:
        """Whether the wanted device is, or turns out to be, the CPU."""
        from gspn2_diffusion.cli.console import CliError
        from gspn2_diffusion.cli.options import resolve_device

        try:
            return resolve_device(self._wanted[0]).type == "cpu"
        except CliError:  # loading says what is wrong
            return False

    def info(self) -> dict[str, Any]:
        """What runs, for people and programs; never a path."""
        loaded = self._loaded
        found: dict[str, Any] = {"model": loaded.name if loaded else self.shelf.first, "state": "loading"}
        found["waiting"] = len(self.line)
        if loaded:
            template = loaded.template
            found.update(
                state="ready",
                model_hash=template.model_hash,
                device=template.device_name or template.device,
                dtype=template.dtype,
                backend=loaded.backend,
            )
        elif self._ready.is_set() and not len(self.line):
            found["state"] = "failed"
        return found

    def draw(self, request: DrawRequest, stop: threading.Event) -> Generator[Event, None, None]:
        """Draws ``request.count`` pictures, one after the other; ends early once ``stop`` is set.

        A set ``stop`` takes effect after the running denoising step at the latest. Closing the iterator has
        the same effect.

        Raises:
            AppError: the line is full, the model is not there, or drawing failed.
        """

        def work(loaded: Loaded, put: Put) -> None:
            for number in range(request.count):
                on_step = _reporter(put, number, request.count)
                picture, settings = drawing.draw_one(loaded, self.shelf, request, number, stop, on_step)
                put(Finished(number, request.count, picture, settings))

        yield from self._in_line(request, stop, work)

    def look(
        self, request: DrawRequest, layer: int, step: float, point: tuple[float, float], stop: threading.Event
    ) -> Generator[Event, None, None]:
        """What a point of the first picture of ``request`` sends; the last event is :class:`Looked`.

        The picture is drawn once more while the denoiser is recorded; the next looks at it use the record.

        Args:
            layer: from 0; the next one that scans is taken.
            step: 0 for the first denoiser call to 1 for the last.
            point: x and y as shares of width and height.

        Raises:
            AppError: as :meth:`draw`, or no layer of the model scans.
        """

        def work(loaded: Loaded, put: Put) -> None:
            put(self._look(loaded, request, layer, step, point, stop, put))

        yield from self._in_line(request, stop, work)

    def _look(
        self,
        loaded: Loaded,
        request: DrawRequest,
        layer: int,
        step: float,
        point: tuple[float, float],
        stop: threading.Event,
        put: Put,
    ) -> Looked:
        from gspn2_diffusion.webapp.propagation import influence, scan_layers

        layers = scan_layers(loaded.pipe.transformer)
        if not layers:
            raise AppError("No layer of this model scans lines.")
        layer = min(layers, key=lambda index: abs(index - layer))
        recorder, calls = self._record(loaded, request, step, stop, put)
        drawing.switch_adapters(loaded, self.shelf, request)
        call = min(recorder.proxies, key=lambda index: abs(index - step * (calls - 1)))
        rows, columns = recorder.grid
        token = min(int(point[1] * rows), rows - 1), min(int(point[0] * columns), columns - 1)
        found = influence(layers[layer], recorder.proxies[call][layer], recorder.grid, token)
        return Looked(found, layer, call, calls)

    def _record(
        self, loaded: Loaded, request: DrawRequest, step: float, stop: threading.Event, put: Put
    ) -> tuple[Recorder, int]:
        """The record of a drawing, made now or before, and the number of its denoiser calls."""
        from gspn2_diffusion.webapp.propagation import Recorder, scan_layers

        key = hash_of(request)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            recorder = self._recorded[key][1]
            return recorder, recorder.calls
        calls = _calls(request)
        tokens = request.width * request.height // loaded.pipe.size_multiple**2
        width = sum(mixer.proxy_dim for mixer in scan_layers(loaded.pipe.transformer).values())
        large = 4 * calls * tokens * width > _RECORD_BYTES
        recorder = Recorder(only=round(step * (calls - 1)) if large else None)
        drawing.draw_one(loaded, self.shelf, request, 0, stop, _reporter(put, 0, 1), recorder)
        if not large:
            self._recorded[key] = (request, recorder)
            while len(self._recorded) > _RECORDS:
                self._recorded.popitem(last=False)
        return recorder, recorder.calls

    def _in_line(
        self, request: DrawRequest, stop: threading.Event, work: Callable[[Loaded, Put], None]
    ) -> Generator[Event, None, None]:
        """Waits for the turn, then runs ``work`` in the drawing thread and passes its events on."""
        name = self.shelf.check_model(request.model)
        ticket = self.line.join()
        working: threading.Event | None = None
        try:
            while self.line.wait(ticket, 0) > 0 or not self._ready.is_set():
                yield Waiting(not self._ready.is_set(), self.line.position(ticket))
                if stop.wait(0.05):
                    return
                if self.line.wait(ticket, _TICK) == 0:
                    self._ready.wait(_TICK)
            events: queue.Queue[Any] = queue.Queue()

            def run() -> None:
                loaded = self._loaded
                if loaded is None or loaded.name != name:
                    events.put(Waiting(True, 0))
                    loaded = self._load(name)
                _check_size(loaded.pipe, request)
                work(loaded, events.put)

            working = self._worker.submit(lambda: _guarded(run, events))
            yield from _collect(events)
        finally:
            if working is not None:
                stop.set()
                working.wait()  # at most for the step that is running
            self.line.leave(ticket)


def hash_of(request: DrawRequest) -> Any:
    """What tells drawings apart; pictures by their content."""
    values = {**vars(request), "count": 1}
    for name in ("picture", "mask"):
        if values[name] is not None:
            values[name] = (values[name].size, values[name].tobytes())
    return tuple(values.items())


def _calls(request: DrawRequest) -> int:
    """About how often the denoiser is called for one picture."""
    strength = 1.0 if request.picture is None else request.strength
    return max(1, round(request.steps * strength)) * (2 if request.scheduler == "heun" else 1)


def _reporter(put: Put, number: int, count: int) -> Callable[[Step], None]:
    def report(step: Step) -> None:
        left = step.seconds / step.done * (step.total - step.done + step.total * (count - number - 1))
        put(Progress(number, count, step.done, step.total, left, step.preview))

    return report


def _check_size(pipe: Any, request: DrawRequest) -> None:
    if request.width % pipe.size_multiple or request.height % pipe.size_multiple:
        raise AppError(f"Width and height must be multiples of {pipe.size_multiple} for this model.")


def _collect(events: queue.Queue[Any]) -> Iterator[Event]:
    """Events as they come; of progress reports that have piled up in a row only the last one."""
    while True:
        batch = [events.get()]
        while not events.empty():
            batch.append(events.get())
        for event, following in zip(batch, [*batch[1:], None], strict=True):
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            if not (isinstance(event, Progress) and isinstance(following, Progress)):
                yield event


def _guarded(run: Callable[[], None], events: queue.Queue[Any]) -> None:
    """The drawing thread: puts events, at the end None or the failure as :class:`AppError`."""
    import torch

    try:
        run()
    except Stopped:
        pass
    except AppError as error:
        events.put(error)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        events.put(AppError("The device has not enough memory for this; try a smaller picture."))
    except Exception:
        logger.exception("drawing failed")
        events.put(AppError("Drawing failed; the server's log says why."))
    finally:
        events.put(None)
