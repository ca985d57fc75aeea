"""The named endpoints, for ``gradio_client`` and other programs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import gradio as gr

from gspn2_diffusion.webapp.engine import Looked
from gspn2_diffusion.webapp.errors import AppError, as_sentences
from gspn2_diffusion.webapp.handlers import FORM, App
from gspn2_diffusion.webapp.limits import MIN_STRENGTH, DrawRequest
from gspn2_diffusion.webapp.pictures import FORMATS, read_picture
from gspn2_diffusion.webapp.records import Record, settings_for_json

FILE_TYPES = [f".{name.lower()}" for name in (*FORMATS, "jpg")]
Answer = tuple[list[str], list[dict[str, Any]]]


def add_endpoints(app: App, form: dict[str, Any]) -> None:
    """Adds the endpoints to the page that is being built.

    Their inputs are the page's own controls, so names, defaults and limits are the same.
    """
    seed = gr.Number(-1, label="Seed", precision=0, minimum=-1, visible=False)
    controls = [{**form, "seed": seed}[name] for name in FORM]
    files = gr.File(label="Pictures", file_count="multiple", visible=False)
    answer, text = gr.JSON(visible=False), gr.Textbox(visible=False)
    inputs = _extra_inputs()
    strength = gr.Slider(MIN_STRENGTH, 1, 0.6, label="Strength", visible=False)
    full = gr.Slider(MIN_STRENGTH, 1, 1.0, label="Strength", visible=False)

    def add(name: str, function: Callable[..., Any], takes: Any, gives: Any, queue: bool = True) -> None:
        gr.Button(visible=False).click(
            function,
            takes,
            gives,
            api_name=name,
            concurrency_limit=None,
            show_progress="hidden",
            queue=queue,
        )

    add("generate", _generate(app), controls, [files, answer])
    add("img2img", _img2img(app), [inputs["image"], *controls, strength], [files, answer])
    add("inpaint", _inpaint(app), [inputs["image"], inputs["mask"], *controls, full], [files, answer])
    place = [inputs[name] for name in ("layer", "step", "x", "y")]
    add("propagation", _propagation(app), [*controls, *place], answer)
    add("settings", _settings(app), inputs["picture"], answer)
    add("stop", _stop(app), None, text, queue=False)
    add("info", app.info, None, answer, queue=False)


def _extra_inputs() -> dict[str, Any]:
    found: dict[str, Any] = {
        name: gr.File(label=name, file_types=FILE_TYPES, visible=False)
        for name in ("image", "mask", "picture")
    }
    for name, value in (("layer", 1), ("step", 1), ("x", 0), ("y", 0)):
        found[name] = gr.Number(value, label=name, minimum=0, visible=False)
    return found


def _as_errors(function: Callable[[], Any], what: str) -> Any:
    """The result of ``function``; what goes wrong becomes a sentence for the client."""
    try:
        with as_sentences(what):
            return function()
    except AppError as error:
        raise gr.Error(str(error)) from None


def _draw(app: App, visitor: Hashable, request: DrawRequest) -> Answer:
    records = [item for item in app.draw(visitor, request) if isinstance(item, Record)]
    return [record.path for record in records], [settings_for_json(record.settings) for record in records]


# Gradio tells the endpoints' arguments from the functions' signatures, hence their length.


def _generate(app: App) -> Callable[..., Answer]:
    def generate(
        prompt: str,
        negative_prompt: str,
        style: str,
        background: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        seed: int,
        count: int,
        model: str,
        lora: str,
        lora_weight: float,
        few_steps: bool,
        request: gr.Request,
    ) -> Answer:
        """Draws ``count`` pictures; a seed of -1 is a random one. Returns the PNG files and their settings.

        Stopped by /stop of the same client, it returns what was finished.
        """
        values = {name: value for name, value in locals().items() if name in FORM}
        return _as_errors(lambda: _draw(app, request.session_hash, app.request(**values)), "drawing")

    return generate


def _img2img(app: App) -> Callable[..., Answer]:
    def img2img(
        image: str | None,
        prompt: str,
        negative_prompt: str,
        style: str,
        background: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        seed: int,
        count: int,
        model: str,
        lora: str,
        lora_weight: float,
        few_steps: bool,
        strength: float,
        request: gr.Request,
    ) -> Answer:
        """As /generate, from a picture that is cut and resized to ``width x height``.

        ``strength`` from 0.05 to 1 says how much of it is drawn anew.
        """
        values = {name: value for name, value in locals().items() if name in FORM}

        def work() -> Answer:
            picture = read_picture(_needed(image, "image"), app.limits)
            wish = app.request(**values, picture=picture, strength=strength)
            return _draw(app, request.session_hash, wish)

        return _as_errors(work, "drawing from a picture")

    return img2img


def _inpaint(app: App) -> Callable[..., Answer]:
    def inpaint(
        image: str | None,
        mask: str | None,
        prompt: str,
        negative_prompt: str,
        style: str,
        background: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        seed: int,
        count: int,
        model: str,
        lora: str,
        lora_weight: float,
        few_steps: bool,
        strength: float,
        request: gr.Request,
    ) -> Answer:
        """As /img2img, of the part that is white in ``mask``, a picture of the same size as ``image``."""
        values = {name: value for name, value in locals().items() if name in FORM}

        def work() -> Answer:
            picture = read_picture(_needed(image, "image"), app.limits)
            white = read_picture(_needed(mask, "mask"), app.limits).convert("L")
            white = white.point(lambda value: 255 if value > 127 else 0)
            wish = app.request(**values, picture=picture, mask=white, strength=strength)
            return _draw(app, request.session_hash, wish)

        return _as_errors(work, "drawing a part of a picture")

    return inpaint


def _needed(path: str | None, name: str) -> str:
    if not path:
        raise AppError(f"No {name} came; send a PNG, JPEG or WebP file.")
    return path


def _propagation(app: App) -> Callable[..., dict[str, Any]]:
    def propagation(
        prompt: str,
        negative_prompt: str,
        style: str,
        background: str,
        width: int,
        height: int,
        steps: int,
        guidance_scale: float,
        scheduler: str,
        seed: int,
        count: int,
        model: str,
        lora: str,
        lora_weight: float,
        few_steps: bool,
        layer: float,
        step: float,
        x: float,
        y: float,
        request: gr.Request,
    ) -> dict[str, Any]:
        """How far the point (``x``, ``y``, in pixels) of the picture that /generate draws reaches.

        ``layer`` and ``step`` count from 1. Returns for each direction, and for "all", the length of what
        arrives at each token (rows from the top), and its mean distance in pixels.
        """
        values = {name: value for name, value in locals().items() if name in FORM}

        def work() -> dict[str, Any]:
            wish = app.request(**values)
            events = app.look(request.session_hash, wish, layer, step, (x, y))
            looked = [event for event in events if isinstance(event, Looked)]
            if not looked:
                raise AppError("Stopped.")
            return describe(looked[-1], wish)

        return _as_errors(work, "looking into the model")

    return propagation


def describe(looked: Looked, request: DrawRequest) -> dict[str, Any]:
    """What was found, as JSON can hold it."""
    found = looked.influence
    rows = found.maps["all"].shape[0]
    return {
        "seed": request.seed,
        "layer": looked.layer + 1,
        "call": looked.call + 1,
        "calls": looked.calls,
        "token": list(found.point),
        "maps": {name: [[round(float(v), 6) for v in row] for row in m] for name, m in found.maps.items()},
        "reach": {name: round(found.reach(name) * request.height / rows, 2) for name in found.maps},
    }


def _settings(app: App) -> Callable[..., dict[str, Any]]:
    def settings(picture: str | None) -> dict[str, Any]:
        """The settings inside a PNG, JPEG or WebP."""
        return _as_errors(lambda: vars(app.restore(picture)), "reading an uploaded picture")

    return settings


def _stop(app: App) -> Callable[..., str]:
    def stop(request: gr.Request) -> str:
        """Stops what this client is drawing, within one step."""
        return app.stop(request.session_hash)

    return stop
