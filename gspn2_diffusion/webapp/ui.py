"""The page: components and which function each of them calls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from gspn2_diffusion.webapp import api
from gspn2_diffusion.webapp.engine import Progress, Waiting
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.handlers import FORM, STOPPING, App, ending_line, progress_line
from gspn2_diffusion.webapp.limits import (
    MAX_GUIDANCE,
    MAX_LORA_WEIGHT,
    MAX_PROMPT,
    RANDOM_SEED,
    SIZE_STEP,
    DrawRequest,
)
from gspn2_diffusion.webapp.panels import QUIET, PropagationPanel, SourcePanel, refuse, shown_iterator
from gspn2_diffusion.webapp.preview import data_uri
from gspn2_diffusion.webapp.records import (
    Record,
    add_record,
    details_html,
    differences_html,
    empty_html,
    gallery_items,
    head_html,
    picture_html,
    status_html,
)
from gspn2_diffusion.webapp.restore import Restored, from_settings
from gspn2_diffusion.webapp.samplers import SCHEDULERS
from gspn2_diffusion.webapp.vocabulary import ASPECTS

FREE = "free"


class Page:
    """Builds the components, then connects them. ``blocks`` is what Gradio serves."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.form: dict[str, Any] = {}
        title = f"{app.shelf.first} - GSPN-2 diffusion"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 7200)) as self.blocks:
            self.history = gr.State([], time_to_live=7200)
            self.chosen = gr.State([])  # the last two pictures that were clicked, newest first
            self.head = gr.HTML(self._head_html())
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=320):
                    self._build_form()
                with gr.Column(scale=6, min_width=320):
                    self._build_results()
            self._connect()
            api.add_endpoints(app, self.form)

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order of :data:`FORM`."""
        return [self.form[name] for name in FORM]

    # Components

    def _build_form(self) -> None:
        app, form = self.app, self.form
        form["prompt"] = gr.Textbox(
            "",  # a value makes it optional in the API, where a sentence is better than a missing argument
            label="Prompt",
            placeholder="a red apple",
            lines=2,
            max_lines=6,
            max_length=MAX_PROMPT,
            autofocus=True,
            elem_id="g2-prompt",
        )
        self._build_model()
        tries = [[text] for text in app.words.examples]
        gr.Examples(tries, form["prompt"], label="Try", api_name=False, elem_id="g2-try")  # type: ignore[arg-type]
        form["style"] = self._chips("Style", app.words.styles, "g2-style")
        form["background"] = self._chips("Background", app.words.background_names, "g2-background")
        with gr.Row(elem_id="g2-buttons"):
            self.generate = gr.Button("Generate", variant="primary", scale=3, elem_id="g2-generate")
            self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, elem_id="g2-stop")
        self._build_size()
        with gr.Accordion("More settings", open=False):
            self._build_more()
        with gr.Accordion("Start from a picture", open=False) as self.start:
            self.source = SourcePanel(app.limits)
        with gr.Accordion("Settings from a picture", open=False):
            self.drop = gr.File(show_label=False, file_types=api.FILE_TYPES, elem_id="g2-drop", height=110)

    def _chips(self, label: str, words: tuple[str, ...], elem_id: str) -> Any:
        choices = [("any", ""), *((word, word) for word in words)]
        shown = bool(words) and self.app.has_chips("")
        return gr.Radio(
            choices, value="", label=label, visible=shown, elem_id=elem_id, elem_classes="g2-chips"
        )

    def _build_model(self) -> None:
        shelf, form = self.app.shelf, self.form
        form["model"] = gr.Dropdown(
            list(shelf.models),
            value=shelf.first,
            label="Model",
            visible=len(shelf.models) > 1,
            elem_id="g2-model",
        )
        with gr.Row(visible=bool(shelf.loras)):
            form["lora"] = gr.Dropdown(
                [("none", ""), *((name, name) for name in shelf.loras)],
                value="",
                label="LoRA",
                min_width=140,
                elem_id="g2-lora",
            )
            form["lora_weight"] = gr.Slider(
                -MAX_LORA_WEIGHT, MAX_LORA_WEIGHT, 1.0, step=0.05, label="LoRA weight", min_width=140
            )

    def _build_size(self) -> None:
        app, form = self.app, self.form
        self.aspect = gr.Radio(
            [*ASPECTS, FREE], value="1:1", label="Shape", elem_id="g2-aspect", elem_classes="g2-chips"
        )
        with gr.Row():
            for name in ("width", "height"):
                form[name] = gr.Slider(
                    app.limits.min_side,
                    app.limits.side,
                    app.base,
                    step=SIZE_STEP,
                    label=name.capitalize(),
                    min_width=140,
                    elem_id=f"g2-{name}",
                )

    def _build_more(self) -> None:
        limits, form = self.app.limits, self.form
        steps, guidance = self.app.shelf.sampling("")
        form["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", placeholder="what to keep out", max_length=MAX_PROMPT
        )
        with gr.Row():
            form["steps"] = gr.Slider(
                1,
                limits.steps,
                min(steps, limits.steps),
                step=1,
                label="Steps",
                min_width=140,
                elem_id="g2-steps",
            )
            form["guidance_scale"] = gr.Slider(
                0, MAX_GUIDANCE, guidance, step=0.1, label="Guidance", min_width=140
            )
        with gr.Row():
            form["scheduler"] = gr.Dropdown(
                [(label, name) for name, label in SCHEDULERS.items()],
                value="euler",
                label="Scheduler",
                min_width=140,
            )
            form["count"] = gr.Slider(1, limits.count, 1, step=1, label="Pictures", min_width=140)
        with gr.Row(equal_height=True):
            form["seed"] = gr.Number(
                0, label="Seed", precision=0, minimum=0, min_width=140, elem_id="g2-seed"
            )
            self.random = gr.Checkbox(
                True, label="A new seed each time", container=False, min_width=140, elem_id="g2-random"
            )

    def _build_results(self) -> None:
        self.stage = gr.HTML(empty_html(), elem_id="g2-stage")
        self.status = gr.HTML(status_html(""), elem_id="g2-status")
        self.gallery = gr.Gallery(
            label="Pictures of this visit",
            show_label=False,
            visible=False,
            columns=4,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            allow_preview=False,
            format="png",
            interactive=False,
            buttons=[],
            elem_id="g2-gallery",
        )
        with gr.Column(visible=False) as self.panel:
            self.details = gr.HTML(elem_id="g2-details")
            with gr.Row(elem_id="g2-actions"):
                self.reuse = gr.Button("Use these settings", size="sm", elem_id="g2-reuse")
                self.again = gr.Button("Start from this picture", size="sm", elem_id="g2-again")
                self.enlarge = gr.Button("Enlarge twice", size="sm", elem_id="g2-enlarge")
                self.download = gr.DownloadButton("Download PNG", size="sm", elem_id="g2-download")
            with gr.Accordion("What GSPN-2 does here", open=False, elem_id="g2-inside"):
                self.inside = PropagationPanel(self.app.layers)
        with gr.Accordion(
            "Compare the last two pictures you clicked", open=False, visible=False
        ) as self.pair:
            self.slider = gr.ImageSlider(type="filepath", show_label=False, interactive=False, format="png")
            self.differences = gr.HTML(elem_id="g2-differences")

    # Connections

    def _connect(self) -> None:
        self._connect_drawing()
        app, form, sizes = self.app, self.form, [self.form["width"], self.form["height"]]
        # In the browser: an answer of the server could come after the next click.
        resize = f"(aspect, width, height) => ({json.dumps(app.aspects())})[aspect] ?? [width, height]"
        self.aspect.input(None, [self.aspect, *sizes], sizes, js=resize, **QUIET)
        for size in sizes:
            size.input(None, None, self.aspect, js=f"() => {json.dumps(FREE)}", **QUIET)
        chips = [form["style"], form["background"]]
        sampling = [form["steps"], form["guidance_scale"]]
        form["model"].input(
            self._on_model,
            form["model"],
            [*chips, *sampling],
            queue=False,
            trigger_mode="always_last",
            **QUIET,
        )
        filled = [*self.inputs, self.random, self.aspect, self.status]
        self.reuse.click(self._on_reuse, [self.chosen, *self.inputs], filled, **QUIET)
        self.drop.upload(self._on_drop, [self.drop, *self.inputs], filled, **QUIET)
        self.blocks.load(self._head_html, None, self.head, queue=False, **QUIET)
        timer = gr.Timer(2.0)
        timer.tick(self._on_timer, None, [self.head, timer], queue=False, **QUIET)
        self.blocks.unload(self._on_unload)
        self._connect_results()
        self._connect_source()

    def _connect_drawing(self) -> None:
        drawn = [self.stage, self.status, self.gallery, self.history, self.head]
        # No limit here: the engine keeps the line, so that it can tell positions, and `Once` drops clicks.
        options: dict[str, Any] = {"concurrency_limit": None, "trigger_mode": "multiple", **QUIET}
        self.generate.click(
            self._on_generate,
            [*self.inputs, *self.source.inputs, self.random, self.history],
            [*drawn, self.form["seed"]],
            **options,
        )
        self.enlarge.click(self._on_enlarge, [self.chosen, self.history], drawn, **options)
        # Said before the server is asked: its answer could come after the last word of what it stops.
        stopping = f"() => {json.dumps(status_html(STOPPING))}"
        self.stop.click(None, None, self.status, js=stopping, **QUIET)
        self.stop.click(self._on_stop, None, self.status, queue=False, **QUIET)

    def _connect_results(self) -> None:
        inside = self.inside
        shown = [self.chosen, self.stage, self.panel, self.details, self.download, self.pair, self.slider]
        shown += [self.differences, inside.map, inside.step, inside.text, inside.point]
        # "multiple": of two quick clicks the second one counts
        self.gallery.select(
            self._on_select, [self.history, self.chosen], shown, trigger_mode="multiple", **QUIET
        )
        inside.connect(self.app, self.chosen, self.status)

    def _connect_source(self) -> None:
        sizes = [self.form["width"], self.form["height"], self.aspect]
        self.source.connect(self.app, sizes, FREE)
        updated = [self.start, self.source.picture, *sizes, *self.source.updated]
        self.again.click(self._on_again, self.chosen, updated, **QUIET)

    # What happens

    def _head_html(self) -> str:
        info = self.app.engine.info()
        return head_html(info["model"], self.app.status_line())

    def _on_timer(self) -> tuple[str, Any]:
        return self._head_html(), gr.Timer(active=not self.app.engine.wait(0))

    def _on_model(self, model: str) -> tuple[Any, ...]:
        shelf, shown = self.app.shelf, self.app.has_chips(model)
        chips = gr.Radio(visible=shown), gr.Radio(visible=shown)
        if len({shelf.sampling(name) for name in shelf.models}) == 1:
            return *chips, gr.skip(), gr.skip()  # what the visitor chose stays
        steps, guidance = shelf.sampling(model)
        return *chips, min(steps, self.app.limits.steps), guidance

    def _on_generate(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        count = len(self.source.inputs)
        form, (*source, random, history) = values[: len(FORM)], values[len(FORM) :]
        wish = dict(zip(FORM, form, strict=True))
        if random:
            wish["seed"] = RANDOM_SEED
        try:
            checked = self.app.request(**wish, **self.source.wish(*source[:count]))
        except AppError as error:
            raise refuse(error) from None
        first = {self.form["seed"]: checked.seed}
        yield from self._draw("generate", request.session_hash, checked, history, first)

    def _on_enlarge(
        self, chosen: list[Record], history: list[Record], request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        if not chosen:
            raise gr.Error("Click a picture first.")
        try:
            checked = self.app.enlarged(chosen[0])
        except AppError as error:
            raise refuse(error) from None
        yield from self._draw("enlarge", request.session_hash, checked, history, {})

    def _draw(
        self, button: str, visitor: Any, checked: DrawRequest, history: list[Record], first: dict[Any, Any]
    ) -> Iterator[dict[Any, Any]]:
        """Draws, with updates of what shows it; nothing while the button's last click is served.

        Args:
            first: what else to update at the start.
        """
        total = 0
        drawing = contextlib.closing(self.app.draw(visitor, checked))
        with self.app.once.hold((button, visitor)) as free, drawing as events:
            if not free:
                yield {self.status: gr.skip()}
                return
            yield {self.status: status_html("Starting", 0.0), **first}
            try:
                for event in shown_iterator(events):
                    if isinstance(event, (Waiting, Progress)):
                        yield self._step(event)
                    elif isinstance(event, Record):
                        total += 1
                        history[:] = add_record(history, event)  # the other button may be adding as well
                        yield self._finished(event, history)
            except gr.Error:
                yield {self.status: status_html("")}
                raise
        yield {self.status: status_html(ending_line(total, checked.count))}

    def _finished(self, record: Record, history: list[Record]) -> dict[Any, Any]:
        return {
            self.stage: picture_html(record.data_uri, record.caption),
            self.gallery: gr.Gallery(gallery_items(history), visible=True),
            self.history: history,
            self.head: self._head_html(),
        }

    def _step(self, event: Waiting | Progress) -> dict[Any, Any]:
        updates: dict[Any, Any] = {self.status: status_html(*progress_line(event))}
        if isinstance(event, Progress) and event.preview is not None:
            updates[self.stage] = picture_html(data_uri(event.preview), "preview")
        return updates

    def _on_stop(self, request: gr.Request) -> Any:
        """What runs says itself that it has stopped."""
        told = self.app.stop(request.session_hash)
        return gr.skip() if told == STOPPING else status_html(told)

    def _on_unload(self, request: gr.Request) -> None:
        self.app.stop(request.session_hash)

    def _on_select(self, history: list[Record], chosen: list[Record], event: gr.SelectData) -> dict[Any, Any]:
        index = event.index if isinstance(event.index, int) else 0
        visible = [record for record in history if gallery_items([record])]
        if not 0 <= index < len(visible):
            raise gr.Error("This picture is gone; draw it again.")
        record = visible[index]
        others = [other for other in chosen if other.path != record.path and gallery_items([other])]
        pair = [*others[:1], record]
        return {
            self.chosen: [record, *others[:1]],
            self.stage: picture_html(record.data_uri, record.caption),
            self.panel: gr.Column(visible=True),
            self.details: details_html(record),
            self.download: gr.DownloadButton(value=record.path),
            self.pair: gr.Accordion(visible=len(pair) == 2),
            self.slider: (pair[0].path, record.path) if len(pair) == 2 else None,
            self.differences: differences_html(*pair) if len(pair) == 2 else "",
            **self.inside.show(record),
        }

    def _on_again(self, chosen: list[Record]) -> list[Any]:
        if not chosen or not gallery_items(chosen[:1]):
            raise gr.Error("Click a picture first.")
        path = chosen[0].path
        return [gr.Accordion(open=True), path, *self.source.taken(self.app, path, FREE)]

    def _on_reuse(self, chosen: list[Record], *form: Any) -> tuple[Any, ...]:
        if not chosen:
            raise gr.Error("Click a picture first.")
        return self._fill(from_settings(chosen[0].settings), form)

    def _on_drop(self, path: str | None, *form: Any) -> tuple[Any, ...]:
        try:
            return self._fill(self.app.restore(path), form)
        except AppError as error:
            raise refuse(error) from None

    def _fill(self, found: Restored, form: tuple[Any, ...]) -> tuple[Any, ...]:
        values, notes = self.app.form_values(found, dict(zip(FORM, form, strict=True)))
        text = "Settings taken over." + (f" Note: {'; '.join(notes)}." if notes else "")
        keeps_seed = found.seed is None or values["seed"] != found.seed
        controls = [values.get(name, gr.skip()) for name in FORM]
        return (*controls, keeps_seed, FREE, status_html(text))
