"""Two parts of the page: the picture to start from with its mask editor, and the look into a scan."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import gradio.component_meta
from PIL import Image as Pictures

from gspn2_diffusion.webapp.engine import Looked, Progress, Waiting
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.handlers import App, progress_line
from gspn2_diffusion.webapp.limits import MIN_STRENGTH, Limits
from gspn2_diffusion.webapp.pictures import natural_size, on_white, painted, read_picture
from gspn2_diffusion.webapp.propagation import ALL, display_size, overlay
from gspn2_diffusion.webapp.records import Record, status_html

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

_EDITED_SIDE = 1024  # of the picture in the mask editor
DIRECTIONS = {ALL: "all four", "down": "↓ down", "up": "↑ up", "right": "→ right", "left": "← left"}


def refuse(error: AppError) -> gr.Error:
    """A message on the page."""
    return gr.Error(str(error))


def shown_iterator(items: Iterator[Any]) -> Iterator[Any]:
    """``items``; an :class:`AppError` among them becomes a message on the page."""
    try:
        yield from items
    except AppError as error:
        raise refuse(error) from None


@contextlib.contextmanager
def _no_stub_files() -> Iterator[None]:
    """Gradio writes a .pyi file beside every module that derives a component; not here."""
    original = gradio.component_meta.create_or_modify_pyi
    gradio.component_meta.create_or_modify_pyi = lambda *_: None
    try:
        yield
    finally:
        gradio.component_meta.create_or_modify_pyi = original


with _no_stub_files():

    class PathImage(gr.Image):
        """A picture that comes as a path: Gradio would decode whatever came, here our checks see it first."""

        is_template = True  # the browser's part is that of gr.Image

        def preprocess(self, payload: Any) -> str | None:
            return payload.path if payload else None


class SourcePanel:
    """A picture to draw from, how much of it to draw anew, and a mask for a part of it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        gr.Markdown("Drop a picture: it is drawn anew after the prompt, as far as the strength says.")
        self.picture = PathImage(
            type="filepath",
            format="png",
            show_label=False,
            sources=["upload", "clipboard"],
            height=220,
            buttons=[],
            elem_id="g2-source",
        )
        self.strength = gr.Slider(
            MIN_STRENGTH, 1, 0.6, step=0.05, label="Strength: how much is drawn anew", elem_id="g2-strength"
        )
        self.masked = gr.Checkbox(
            False, label="Draw only a part anew, which I paint", elem_id="g2-masked", visible=False
        )
        self.editor = gr.ImageEditor(
            type="pil",
            show_label=False,
            visible=False,
            sources=[],
            transforms=[],
            layers=False,
            height=380,
            brush=gr.Brush(default_size=28, colors=["#ff3d7f"], color_mode="fixed"),
            buttons=[],
            elem_id="g2-mask",
        )

    @property
    def inputs(self) -> list[Any]:
        return [self.picture, self.strength, self.masked, self.editor]

    def wish(self, picture: Any, strength: Any, masked: Any, edited: Any) -> dict[str, Any]:
        """The values of :attr:`inputs` as arguments of :meth:`App.request`; none without a picture.

        Raises:
            AppError: the picture cannot be used; or a part is wanted, but nothing is painted.
        """
        if not picture:
            return {}
        if not masked:
            return {"picture": read_picture(picture, self._limits), "strength": strength}
        edited = edited or {}
        mask = painted(edited.get("layers") or [])
        background = edited.get("background")
        if mask is None or background is None:
            raise AppError("Nothing is painted; paint over the part that is to be drawn anew.")
        if mask.size != background.size:
            mask = mask.resize(background.size)
        return {"picture": on_white(background), "mask": mask, "strength": strength}

    def toggle(self, picture: Any, masked: bool) -> tuple[Any, Any]:
        """Updates of strength and editor when the box is ticked."""
        shown = bool(masked and picture)
        value: Any = None
        if shown:
            try:
                opened = read_picture(picture, self._limits)
            except AppError as error:
                raise refuse(error) from None
            opened.thumbnail((_EDITED_SIDE, _EDITED_SIDE))
            value = {"background": opened, "layers": [], "composite": opened}
        return gr.Slider(value=1.0 if masked else 0.6), gr.ImageEditor(visible=shown, value=value)

    @property
    def updated(self) -> list[Any]:
        """What changes, beside the sizes, when another picture comes."""
        return [self.masked, self.strength, self.editor]

    def connect(self, app: App, sizes: list[Any], free: str) -> None:
        """Events of the panel. ``sizes`` are width, height and shape, of which ``free`` is one value."""
        changed = [self.picture, *sizes, *self.updated]
        for event in (self.picture.upload, self.picture.clear):
            event(lambda picture: self._on_picture(app, picture, free), self.picture, changed, **QUIET)
        self.masked.input(self.toggle, [self.picture, self.masked], [self.strength, self.editor], **QUIET)

    def _on_picture(self, app: App, picture: Any, free: str) -> list[Any]:
        """A picture that cannot be used is taken out again."""
        try:
            return [gr.skip(), *self.taken(app, picture, free)]
        except AppError as error:
            gr.Warning(str(error))
            return [None, *self.taken(app, None, free)]

    def taken(self, app: App, picture: Any, free: str) -> list[Any]:
        """Updates of width, height, shape and :attr:`updated` for another picture, or none.

        Raises:
            AppError: it cannot be used.
        """
        sizes: list[Any] = [gr.skip()] * 3
        if picture:
            low, high = app.limits.min_side, app.limits.side
            sizes = [*natural_size(read_picture(picture, self._limits).size, app.base, low, high), free]
        shown = gr.Checkbox(value=False, visible=bool(picture))
        return [*sizes, shown, gr.Slider(value=0.6), gr.ImageEditor(visible=False, value=None)]


class PropagationPanel:
    """The map of a point's influence over a finished picture."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        gr.Markdown(
            "Each layer carries information over the picture line by line, in four directions. Click a "
            "point to see **how far its information travels** in one layer, at one step: bright is strong. "
            "The first click draws the picture once more to record what the layers do."
        )
        self.map = gr.Image(
            show_label=False, interactive=False, format="png", buttons=["fullscreen"], elem_id="g2-map"
        )
        with gr.Row():
            self.layer = gr.Slider(
                1, layers, (layers + 1) // 2, step=1, label="Layer", min_width=140, elem_id="g2-layer"
            )
            self.step = gr.Slider(1, 20, 10, step=1, label="Step", min_width=140, elem_id="g2-step")
        self.direction = gr.Radio(
            [(label, name) for name, label in DIRECTIONS.items()],
            value=ALL,
            label="Direction",
            elem_id="g2-direction",
            elem_classes="g2-chips",
        )
        self.text = gr.HTML(_note(""), elem_id="g2-reach")
        self.point = gr.State(None)  # x and y in pixels of the picture

    def connect(self, app: App, chosen: Any, status: Any) -> None:
        """Events of the panel. ``chosen`` holds the clicked records, newest first."""
        controls = [self.layer, self.step, self.direction]
        changed = [self.map, self.text, self.point, status]

        def on_click(
            records: list[Record], layer: Any, step: Any, direction: str, event: gr.SelectData,
            request: gr.Request,
        ) -> Iterator[dict[Any, Any]]:  # fmt: skip
            record = _lookable(records)
            size = record.request.width, record.request.height
            point = clicked_point(event, display_size(size), size)
            yield {self.point: point}
            yield from look(record, point, layer, step, direction, request)

        def on_change(
            records: list[Record], point: Any, layer: Any, step: Any, direction: str, request: gr.Request
        ) -> Iterator[dict[Any, Any]]:
            if point is None or not records:
                yield {status: gr.skip()}
            else:
                yield from look(_lookable(records), point, layer, step, direction, request)

        def look(
            record: Any, point: Any, layer: Any, step: Any, direction: str, request: gr.Request
        ) -> Iterator[dict[Any, Any]]:
            events = app.look(request.session_hash, record.request, layer, step, point)
            done = False
            try:
                for event in shown_iterator(events):
                    if isinstance(event, (Waiting, Progress)):
                        line, share = progress_line(event)
                        yield {status: status_html(f"Looking into the model: {line}", share)}
                    elif isinstance(event, Looked):
                        done = True
                        yield {**self.found(event, record, direction), status: status_html("Done")}
            finally:
                events.close()
            if not done:
                yield {status: status_html("Stopped")}

        common: dict[str, Any] = {"outputs": changed, "concurrency_limit": None, **QUIET}
        self.map.select(on_click, [chosen, *controls], trigger_mode="once", **common)
        gr.on(
            [self.layer.release, self.step.release, self.direction.input],
            on_change,
            [chosen, self.point, *controls],
            trigger_mode="always_last",
            **common,
        )

    def show(self, record: Record) -> dict[Any, Any]:
        """Updates for a newly chosen picture."""
        steps = record.settings.steps
        possible = record.request is not None
        text = "Click a point of the picture." if possible else "This picture cannot be looked into."
        with Pictures.open(record.path) as picture:
            enlarged = picture.convert("RGB").resize(display_size(picture.size), Pictures.Resampling.LANCZOS)
        return {
            self.map: enlarged,
            self.step: gr.Slider(maximum=max(steps, 2), value=(steps + 1) // 2, interactive=steps > 1),
            self.text: _note(text),
            self.point: None,
        }

    def found(self, looked: Looked, record: Record, direction: str) -> dict[Any, Any]:
        """The picture with the map, and what it says in words."""
        found = looked.influence
        direction = direction if direction in found.maps else ALL
        with Pictures.open(record.path) as picture:
            shown = overlay(picture.convert("RGB"), found.maps[direction], found.point)
        return {self.map: shown, self.text: _note(describe(looked, record.settings.height), True)}


def _lookable(records: list[Record]) -> Any:
    if not records or records[0].request is None or not Path(records[0].path).exists():
        raise gr.Error("Click a picture of this visit first.")
    return records[0]


def clicked_point(event: gr.SelectData, shown: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of a picture of ``size`` (width, height) from a click on one that is ``shown`` enlarged."""
    x, y = (
        min(max(float(value), 0.0) * whole / pixels, whole)
        for value, whole, pixels in zip(event.index[:2], size, shown, strict=True)
    )
    return x, y


def describe(looked: Looked, height: int) -> str:
    """How far it travels, in words and pixels."""
    found = looked.influence
    pixels = height / found.maps[ALL].shape[0]
    each = ", ".join(
        f"{DIRECTIONS[name]} {found.reach(name) * pixels:.0f}" for name in found.maps if name != ALL
    )
    return (
        f"Layer {looked.layer + 1}, denoiser call {looked.call + 1} of {looked.calls}: "
        f"on average the influence travels {found.reach() * pixels:.0f} pixels ({each})."
    )


def _note(text: str, strong: bool = False) -> str:
    return f'<p class="g2-note{" g2-found" if strong else ""}">{html.escape(text)}</p>'
