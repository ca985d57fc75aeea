"""The named endpoints, for ``gradio_client`` and other programs."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import gradio as gr

from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.handlers import FORM, App
from gspn2_diffusion.webapp.records import Record, settings_for_json


def add_endpoints(app: App, form: dict[str, Any]) -> None:
    """Adds ``/generate``, ``/stop``, ``/settings`` and ``/info`` to the page that is being built.

    The endpoints' inputs are the page's own controls, so names, defaults and limits are the same.
    """

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
        request: gr.Request,
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """Draws ``count`` pictures; a seed of -1 is a random one. Returns the PNG files and their settings.

        Stopped by /stop of the same client, it returns what was finished.
        """
        values = {name: value for name, value in locals().items() if name in form}
        try:
            records = _draw(app, request.session_hash, values)
        except AppError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return [record.path for record in records], [settings_for_json(record.settings) for record in records]

    def stop(request: gr.Request) -> str:
        """Stops what this client is drawing, within one step."""
        return app.stop(request.session_hash)

    def settings(picture: str | None) -> dict[str, Any]:
        """The settings inside a PNG."""
        try:
            return vars(app.restore(picture))
        except AppError as error:
            raise gr.Error(str(error), print_exception=False) from None

    seed = gr.Number(-1, label="Seed", precision=0, minimum=-1, visible=False)
    files = gr.File(label="Pictures", file_count="multiple", visible=False)
    picture = gr.File(label="PNG", file_types=[".png"], visible=False)
    answer, text = gr.JSON(visible=False), gr.Textbox(visible=False)
    controls = {**form, "seed": seed}
    gr.Button(visible=False).click(
        generate,
        [controls[name] for name in FORM],
        [files, answer],
        api_name="generate",
        concurrency_limit=None,
        show_progress="hidden",
    )
    gr.Button(visible=False).click(stop, None, text, api_name="stop", queue=False)
    gr.Button(visible=False).click(settings, picture, answer, api_name="settings")
    gr.Button(visible=False).click(app.info, None, answer, api_name="info", queue=False)


def _draw(app: App, visitor: Hashable, values: dict[str, Any]) -> list[Record]:
    request = app.request(**values)
    return [item for item in app.draw(visitor, request) if isinstance(item, Record)]
