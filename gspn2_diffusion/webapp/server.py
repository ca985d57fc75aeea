"""Starts the server with safe settings."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.webapp.limits import Limits

if TYPE_CHECKING:
    from gspn2_diffusion.webapp.engine import Engine
    from gspn2_diffusion.webapp.ui import Page

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerOptions:
    """How to serve. None leaves a value to Gradio's own variables and defaults (127.0.0.1, port 7860 on).

    Attributes:
        models: what visitors may choose from, the first is loaded at the start.
        lora_dir: a folder whose LoRAs visitors may choose; None for no LoRA.
        auth: ``(user, password)``; None lets everybody in who can reach the address.
    """

    models: tuple[str, ...]
    lora_dir: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    host: str | None = None
    port: int | None = None
    share: bool = False
    auth: tuple[str, str] | None = None
    browser: bool = False
    limits: Limits = field(default_factory=Limits)


def launch(options: ServerOptions, block: bool = True) -> Any:
    """Serves the page.

    Args:
        block: False returns at once; the caller closes what is returned (``page.blocks.close()``, then
            ``page.app.close()``).

    Returns:
        The :class:`gspn2_diffusion.webapp.ui.Page`.

    Raises:
        CliError: a model or LoRA does not exist.
        OSError: the port is taken.
    """
    from gspn2_diffusion.webapp.engine import Engine
    from gspn2_diffusion.webapp.shelf import build_shelf
    from gspn2_diffusion.webapp.worker import keep_few_arenas

    keep_few_arenas()
    shelf = build_shelf(options.models, options.lora_dir)
    engine = Engine(shelf, options.device, options.dtype, options.limits.queue)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        engine.load_in_background()  # while Gradio is imported
        page = _build(engine, options)
        stack.callback(page.app.close)
        _serve(page, options)
        if block:
            page.blocks.block_thread()
        else:
            stack.pop_all()
    return page


def _build(engine: Engine, options: ServerOptions) -> Page:
    import PIL.Image

    # A folder of its own for uploads: their addresses contain it, and nobody else's files lie there.
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="gspn2-uploads-"))
    from gspn2_diffusion.webapp.errors import sentences_without_tracebacks
    from gspn2_diffusion.webapp.handlers import App
    from gspn2_diffusion.webapp.ui import Page

    # For what decodes without asking us first, such as Gradio's editor: Pillow refuses twice this number.
    PIL.Image.MAX_IMAGE_PIXELS = options.limits.upload_pixels // 2
    sentences_without_tracebacks()
    return Page(App(engine, options.limits))


def _serve(page: Page, options: ServerOptions) -> None:
    from starlette.requests import ClientDisconnect

    from gspn2_diffusion.webapp.errors import gone_away
    from gspn2_diffusion.webapp.style import CSS, HEAD, chip_css

    # Every waiting visitor holds a Gradio job; the engine's line is the one that says "full".
    page.blocks.queue(max_size=4 * options.limits.queue)
    page.blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=options.share or os.environ.get("GRADIO_SHARE", "").lower() == "true",
        auth=options.auth,
        inbrowser=options.browser,
        prevent_thread_lock=True,
        max_threads=40 + options.limits.queue,
        max_file_size=options.limits.upload_bytes,
        show_error=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"exception_handlers": {ClientDisconnect: gone_away}},
        num_workers=0,  # else it listens on a second port
        footer_links=["api", "settings"],
        theme=_theme(),
        css=CSS + chip_css(page.app.words),
        head=HEAD,
        quiet=False,
    )


def _theme() -> Any:
    """Plain labels, and fonts of the visitor's own system: nothing is fetched from elsewhere."""
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    plain = {"background_fill": "transparent", "text_color": "*body_text_color_subdued"}
    labels = ("block_title", "block_label")
    return theme.set(
        **{
            f"{label}_{name}{mode}": value
            for label in labels
            for name, value in plain.items()
            for mode in ("", "_dark")
        },
        block_title_padding="0",
    )
