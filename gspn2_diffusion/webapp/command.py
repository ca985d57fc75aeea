"""``gspn2 app``: the options of the page's server. Loads neither torch nor Gradio before they are needed."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Annotated

import typer

from gspn2_diffusion.cli import defaults, options
from gspn2_diffusion.cli.console import CliError, UsageError
from gspn2_diffusion.webapp.limits import SIZE_STEP, Limits
from gspn2_diffusion.webapp.server import ServerOptions, launch

_LIMITS = Limits()


def app(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="An embedded model, a folder, or a Hub id 'owner/name'. Given several times, visitors may "
            "choose among them; the first is loaded at the start.",
        ),
    ] = [defaults.MODEL],  # noqa: B006
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            "--lora-dir", help="Folder whose LoRAs visitors may choose. Needs peft.", show_default=False
        ),
    ] = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            help="Address to listen on; 0.0.0.0 lets other machines in (also: GRADIO_SERVER_NAME). "
            "Only this machine by default.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            min=1,
            max=65535,
            help="The first free one from 7860 by default (also: GRADIO_SERVER_PORT).",
            show_default=False,
        ),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also serve through Gradio's public tunnel.")
    ] = False,
    auth: Annotated[
        str | None,
        typer.Option(
            "--auth", envvar="GSPN2_APP_AUTH", help="USER:PASSWORD to ask visitors for.", show_default=False
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    max_side: Annotated[
        int, typer.Option("--max-side", min=64, max=4096, help="Largest height and width in pixels.")
    ] = _LIMITS.side,
    max_steps: Annotated[
        int, typer.Option("--max-steps", min=1, max=1000, help="Most steps.")
    ] = _LIMITS.steps,
    max_count: Annotated[
        int, typer.Option("--max-count", min=1, max=100, help="Most pictures of one request.")
    ] = _LIMITS.count,
    max_queue: Annotated[
        int, typer.Option("--max-queue", min=1, max=1000, help="Most requests that wait or run at once.")
    ] = _LIMITS.queue,
    debug: options.DebugOption = False,
) -> None:
    """Serve the web page."""
    if max_side % SIZE_STEP:
        raise UsageError(f"--max-side must be a multiple of {SIZE_STEP}, got {max_side}")
    server = ServerOptions(
        models=tuple(options.check_text("--model", name) for name in model),
        lora_dir=lora_dir,
        device=options.check_device_name(device),
        dtype=options.check_dtype(dtype),
        host=host,
        port=port,
        share=share,
        auth=_auth(auth),
        browser=browser,
        limits=Limits(side=max_side, steps=max_steps, count=max_count, queue=max_queue),
    )
    if importlib.util.find_spec("gradio") is None:
        raise CliError('gradio is not installed; pip install "gspn2-diffusion[app]"')
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("gspn2_diffusion").setLevel(logging.INFO)
    launch(server)


def _auth(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise UsageError("--auth must be USER:PASSWORD")  # without the value: it may be half a password
    return user, password
