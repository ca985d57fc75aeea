"""The page: which function each of its components calls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from gspn2_diffusion.webapp import api
from gspn2_diffusion.webapp.components import FREE, Components, few_steps_label
from gspn2_diffusion.webapp.engine import Progress, Waiting
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.handlers import FORM, STOPPING, App, ending_line, progress_line
from gspn2_diffusion.webapp.limits import (
    RANDOM_SEED,
    DrawRequest,
)
from gspn2_diffusion.webapp.panels import QUIET, refuse, shown_iterator
from gspn2_diffusion.webapp.preview import data_uri
from gspn2_diffusion.webapp.records import (
    Record,
    add_record,
    details_html,
    differences_html,
    gallery_items,
    head_html,
    picture_html,
    status_html,
)
from gspn2_diffusion.webapp.restore import Restored, from_settings


class Page(Components):
    """Builds the components, then connects them. ``blocks`` is what Gradio serves."""

    def __init__(self, app: App) -> None:
        super().__init__(app)
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
        given = {name: [app.sampling(name, few) for few in (False, True)] for name in app.shelf.models}
        form["few_steps"].input(
            None,
            [form["few_steps"], form["model"]],
            sampling,
            js=f"(few, model) => ({json.dumps(given)})[model][few ? 1 : 0]",
            **QUIET,
        )
        form["model"].input(
            self._on_model,
            [form["model"], form["few_steps"]],
            [*chips, form["few_steps"], *sampling],
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

    def _on_model(self, model: str, few_steps: bool) -> tuple[Any, ...]:
        shelf, shown, few = self.app.shelf, self.app.has_chips(model), self.app.shelf.few_steps(model)
        chips = gr.Radio(visible=shown), gr.Radio(visible=shown)
        box = gr.Checkbox(visible=bool(few), label=few_steps_label(few))
        if len({self.app.sampling(name, few_steps) for name in shelf.models}) == 1:
            return *chips, box, gr.skip(), gr.skip()  # what the visitor chose stays
        return *chips, box, *self.app.sampling(model, few_steps)

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
        ending: dict[Any, Any] = {self.status: status_html(ending_line(total, checked.count))}
        # Once more: of two draws that end together, the gallery of the one with fewer pictures may come last.
        yield {**ending, **self._shelved(history)} if total else ending

    def _finished(self, record: Record, history: list[Record]) -> dict[Any, Any]:
        return {
            self.stage: picture_html(record.data_uri, record.caption),
            **self._shelved(history),
            self.head: self._head_html(),
        }

    def _shelved(self, history: list[Record]) -> dict[Any, Any]:
        return {self.gallery: gr.Gallery(gallery_items(history), visible=True), self.history: history}

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
