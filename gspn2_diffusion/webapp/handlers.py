"""What the page's buttons and the API's endpoints do; no components in here."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Hashable
from pathlib import Path
from typing import Any

from PIL import Image

from gspn2_diffusion import __version__
from gspn2_diffusion.webapp.engine import Engine, Event, Finished, Progress, Waiting
from gspn2_diffusion.webapp.errors import AppError, as_sentences
from gspn2_diffusion.webapp.limits import (
    MAX_LORA_WEIGHT,
    MAX_SEED,
    SIZE_STEP,
    DrawRequest,
    Limits,
    check_integer,
    check_number,
    check_request,
)
from gspn2_diffusion.webapp.pictures import check_picture, fitted
from gspn2_diffusion.webapp.records import Record, Store
from gspn2_diffusion.webapp.restore import Restored, restore
from gspn2_diffusion.webapp.samplers import SCHEDULERS, scheduler_name
from gspn2_diffusion.webapp.vocabulary import (
    ASPECTS,
    Vocabulary,
    aspect_size,
    base_size,
    compose_prompt,
    layer_count,
    split_prompt,
    vocabulary_of,
)
from gspn2_diffusion.webapp.waiting import Once, Running

REFINEMENT = 0.35  # of an enlarged picture is drawn anew

STOPPING = "Stopping."

# The controls of the page and the arguments of /generate, in this order.
FORM = (
    "prompt",
    "negative_prompt",
    "style",
    "background",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "scheduler",
    "seed",
    "count",
    "model",
    "lora",
    "lora_weight",
    "few_steps",
)


class App:
    """One running page: its model, its limits, its visitors."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.store = Store()
        self.running = Running()
        self.once = Once()
        self.shelf = engine.shelf
        known = [vocabulary_of(name) for name in self.shelf.models]
        # The chips on the page; models that have no such words do without them.
        self.words: Vocabulary = next((words for words in known if words.styles), known[0])
        source = self.shelf.models[self.shelf.first]
        self.base = max(limits.min_side, min(base_size(source), limits.side) // SIZE_STEP * SIZE_STEP)
        self.layers = max(layer_count(source) for source in self.shelf.models.values())
        # On a CPU the page starts with few steps where the first model has them.
        self.starts_with_few_steps = bool(self.shelf.few_steps("")) and engine.draws_on_cpu()

    def has_chips(self, model: str) -> bool:
        """Whether a model knows the words of the chips."""
        return bool(vocabulary_of(model or self.shelf.first).styles)

    def sampling(self, model: str, few_steps: bool = False) -> tuple[int, float]:
        """Steps and guidance that a model draws best with, as far as the limits allow."""
        steps, guidance = self.shelf.sampling(model, few_steps)
        return min(steps, self.limits.steps), guidance

    def aspects(self) -> dict[str, tuple[int, int]]:
        """Width and height of each shape on offer."""
        low = self.limits.min_side
        found = {aspect: aspect_size(aspect, self.base, self.limits.side) for aspect in ASPECTS}
        return {aspect: (max(width, low), max(height, low)) for aspect, (width, height) in found.items()}

    def request(self, prompt: Any, style: Any, background: Any, **values: Any) -> DrawRequest:
        """Checks everything; chips become words of the prompt.

        Raises:
            AppError: with a sentence about the first thing that is wrong.
        """
        values["model"] = self.shelf.check_model(_name(values.get("model")))
        values["lora"] = self.shelf.check_lora(_name(values.get("lora")))
        values["few_steps"] = bool(values.get("few_steps")) and bool(self.shelf.few_steps(values["model"]))
        if not self.has_chips(values["model"]):
            style = background = ""
        if values.get("picture") is not None:
            check_picture(values["picture"], values.get("mask"))
        for name, value, known in (
            ("style", style, self.words.styles),
            ("background", background, self.words.background_names),
        ):
            if value and value not in known:
                raise AppError(f"The {name} must be one of: {', '.join(known) or 'none for this model'}.")
        if isinstance(prompt, str) and prompt.strip():
            prompt = compose_prompt(prompt, style, background)
        checked = check_request(self.limits, tuple(SCHEDULERS), prompt=prompt, **values)
        return fitted(checked)

    def enlarged(self, record: Record) -> DrawRequest:
        """The request for a picture twice as large as a finished one.

        Raises:
            AppError: it is gone, or too large already.
        """
        before = record.request
        if before is None or not Path(record.path).exists():
            raise AppError("This picture cannot be enlarged any more; draw it again.")
        width, height, most = 2 * before.width, 2 * before.height, 2 * self.limits.side
        if max(width, height) > most:
            raise AppError(f"Pictures of more than {most} pixels along a side are not drawn here.")
        with Image.open(record.path) as picture:
            image = picture.convert("RGB")
        refined = dataclasses.replace(
            before, width=width, height=height, picture=image, mask=None, strength=REFINEMENT, enlarge=True
        )
        if not before.few_steps:
            return refined
        # A third of a few steps would be a single one.
        steps, guidance = self.sampling(before.model)
        return dataclasses.replace(refined, few_steps=False, steps=steps, guidance_scale=guidance)

    def draw(self, visitor: Hashable, request: DrawRequest) -> Generator[Event | Record, None, None]:
        """The engine's events; a finished picture also comes as a record, right after its event."""
        stop = self.running.start(visitor)
        events = self.engine.draw(request, stop)
        try:
            with as_sentences("drawing"):
                for event in events:
                    yield event
                    if isinstance(event, Finished):
                        alone = dataclasses.replace(request, seed=event.settings.seed, count=1)
                        yield self.store.save(event.picture, event.settings, alone)
        finally:
            events.close()  # the model is free from here on
            self.running.end(visitor, stop)

    def look(
        self, visitor: Hashable, request: DrawRequest, layer: Any, step: Any, point: tuple[Any, Any]
    ) -> Generator[Event, None, None]:
        """The engine's events; the last one tells what a point of the request's picture sends.

        Args:
            layer: from 1.
            step: from 1 to the request's number of steps.
            point: x and y in pixels.

        Raises:
            AppError: a number outside its limits, or drawing failed.
        """
        if request.enlarge:
            raise AppError("An enlarged picture cannot be looked into; click the one that it came from.")
        index = check_integer("The layer", layer, 1, self.layers) - 1
        number = check_integer("The step", step, 1, request.steps)
        x = check_number("The point's x", point[0], 0, request.width)
        y = check_number("The point's y", point[1], 0, request.height)
        share = (number - 1) / (request.steps - 1) if request.steps > 1 else 0.0
        stop = self.running.start(visitor)
        place = (x / request.width, y / request.height)
        events = self.engine.look(request, index, share, place, stop)
        try:
            with as_sentences("looking into the model"):
                yield from events
        finally:
            events.close()
            self.running.end(visitor, stop)

    def stop(self, visitor: Hashable) -> str:
        """Stops everything ``visitor`` has asked for."""
        return STOPPING if self.running.stop(visitor) else "Nothing is running."

    def close(self) -> None:
        """Stops what is being drawn, ends the engine, and removes the pictures."""
        self.running.stop_all()
        self.engine.close()
        self.store.close()

    def info(self) -> dict[str, Any]:
        """Model, backend, limits and words, for programs."""
        return {
            **self.engine.info(),
            "program": f"gspn2-diffusion {__version__}",
            "default_size": self.base,
            "limits": dataclasses.asdict(self.limits),
            "schedulers": dict(SCHEDULERS),
            "styles": list(self.words.styles),
            "backgrounds": list(self.words.background_names),
            "models": list(self.shelf.models),
            "loras": list(self.shelf.loras),
            "layers": self.layers,
        }

    def status_line(self) -> str:
        """What runs, in one line for people."""
        found = self.engine.info()
        if found["state"] == "loading":
            return f"{found['model']} is loading; you can already press Generate."
        if found["state"] == "failed":
            return f"{found['model']} could not be loaded; the server's log says why."
        device = "the CPU" if found["device"] == "cpu" else found["device"]
        return f"{found['model']} on {device}, {found['dtype']}, line scans by {found['backend']}"

    def restore(self, path: str | None) -> Restored:
        """The settings in an uploaded picture.

        Raises:
            AppError: no file, not acceptable, or nothing inside.
        """
        if not path:
            raise AppError("No picture came; choose or drop a file.")
        with as_sentences("reading an uploaded picture"):
            return restore(path, self.limits)

    def form_values(self, found: Restored, now: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Values for the page's controls from a picture's settings, and what could not be taken over.

        Args:
            now: the controls' present values, kept where the picture does not say or says too much.
        """
        prompt, style, background = split_prompt(found.prompt, self.words)
        values: dict[str, Any] = {"prompt": prompt, "style": style or "", "background": background or ""}
        values["negative_prompt"] = found.negative_prompt
        notes = [found.note] if found.note else []
        steps, guidance = found.steps, found.guidance_scale
        checks: dict[str, tuple[Any, bool]] = {
            "steps": (steps, steps is not None and 1 <= steps <= self.limits.steps),
            "guidance_scale": (guidance, guidance is not None and 0 <= guidance <= 20),
            "seed": (found.seed, found.seed is not None and 0 <= found.seed <= MAX_SEED),
            "width": (found.width, self._side_fits(found.width)),
            "height": (found.height, self._side_fits(found.height)),
        }
        for name, (value, fits) in checks.items():
            values[name] = value if fits else now[name]
            if value is not None and not fits:
                notes.append(f"{name.replace('_', ' ')} {value} is not possible here")
        values["scheduler"] = scheduler_name(found.scheduler) or now["scheduler"]
        if found.scheduler and not scheduler_name(found.scheduler):
            notes.append(f"the scheduler {found.scheduler} is not on offer")
        notes += self._take_names(found, values, now)
        return values, notes

    def _take_names(self, found: Restored, values: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """Model, LoRA and few steps, as far as they are on the shelf, into ``values``."""
        values["model"] = found.model if found.model in self.shelf.models else now["model"]
        wanted = now["few_steps"] if found.few_steps is None else found.few_steps
        values["few_steps"] = bool(wanted and self.shelf.few_steps(values["model"]))
        values["lora"], values["lora_weight"] = "", now["lora_weight"]
        by_hash = {lora.sha256: name for name, lora in self.shelf.loras.items()}
        known = [
            (by_hash[lora["sha256"]], lora["weight"]) for lora in found.loras if lora["sha256"] in by_hash
        ]
        if known and abs(known[0][1]) <= MAX_LORA_WEIGHT:
            values["lora"], values["lora_weight"] = known[0]
        notes = [
            f"the LoRA {lora['name']} is not used" for lora in found.loras if lora["name"] != values["lora"]
        ]
        if found.few_steps and not values["few_steps"]:
            notes.append("this model has no few-step adapter")
        return notes + self._model_note(found)

    def _side_fits(self, side: int | None) -> bool:
        low, high = self.limits.min_side, self.limits.side
        return side is not None and low <= side <= high and side % SIZE_STEP == 0

    def _model_note(self, found: Restored) -> list[str]:
        here = str(self.engine.info().get("model_hash", ""))
        if not found.model_hash or not here or here.startswith(found.model_hash[:10]):
            return []
        return [f"it was drawn by another model, {found.model or 'unknown'}"]


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


def progress_line(event: Waiting | Progress) -> tuple[str, float | None]:
    """An event as a line of text and the share of the bar that is full."""
    if isinstance(event, Waiting):
        if event.before:
            return f"Waiting: {event.before} before you in the queue", 0.0
        return "The model is loading", 0.0
    which = f"Picture {event.number + 1} of {event.count}: " if event.count > 1 else ""
    done = (event.number + event.done / event.total) / event.count
    return f"{which}{event.done}/{event.total}, {duration(event.seconds_left)} left", done


def ending_line(drawn: int, wanted: int) -> str:
    """The last word about a request for ``wanted`` pictures."""
    if drawn == wanted:
        return "Done" if wanted == 1 else f"Done: {drawn} pictures"
    return f"Stopped after {drawn} of {wanted}" if wanted > 1 else "Stopped"


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 5 s``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
