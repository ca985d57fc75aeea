"""What is on the page: its components, not yet connected to anything."""

from __future__ import annotations

from typing import Any

import gradio as gr

from gspn2_diffusion.webapp import api
from gspn2_diffusion.webapp.handlers import App
from gspn2_diffusion.webapp.limits import MAX_GUIDANCE, MAX_LORA_WEIGHT, MAX_PROMPT, SIZE_STEP
from gspn2_diffusion.webapp.panels import PropagationPanel, SourcePanel
from gspn2_diffusion.webapp.records import empty_html, status_html
from gspn2_diffusion.webapp.samplers import SCHEDULERS
from gspn2_diffusion.webapp.vocabulary import ASPECTS

FREE = "free"


def few_steps_label(steps: int | None) -> str:
    """Of the box that switches a model's few-step adapter on."""
    return f"Fast: {steps or 'few'} steps, without guidance"


class Components:
    """Builds the form on the left and the results on the right, inside the caller's ``gr.Blocks``.

    Attributes:
        form: the controls by their names in :data:`FORM`.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.form: dict[str, Any] = {}

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
        self._build_few_steps()
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

    def _build_few_steps(self) -> None:
        shelf = self.app.shelf
        self.form["few_steps"] = gr.Checkbox(
            self.app.starts_with_few_steps,
            label=few_steps_label(shelf.few_steps("")),
            visible=bool(shelf.few_steps("")),
            container=False,
            elem_id="g2-few-steps",
        )

    def _build_more(self) -> None:
        limits, form = self.app.limits, self.form
        steps, guidance = self.app.sampling("", self.app.starts_with_few_steps)
        form["negative_prompt"] = gr.Textbox(
            "", label="Negative prompt", placeholder="what to keep out", max_length=MAX_PROMPT
        )
        with gr.Row():
            form["steps"] = gr.Slider(
                1,
                limits.steps,
                steps,
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
