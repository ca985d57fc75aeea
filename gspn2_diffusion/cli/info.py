"""``gspn2 info``: the settings inside a picture."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gspn2_diffusion.cli import options
from gspn2_diffusion.cli.console import CliError, describe, say


def info(
    picture: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP file.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    debug: options.DebugOption = False,
) -> None:
    """Show the settings in a picture: ours, the A1111 web UI's, or ComfyUI's where they can be read.

    Exit codes: 0 shown, 1 no picture or no settings in it, 2 wrong usage.
    """
    program, settings = read_any(picture)
    if as_json:
        say(json.dumps({"program": program, "settings": settings}, ensure_ascii=False), sys.stdout)
        return
    for key, value in {"made by": program, **settings}.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
        say(f"{key + ':':<19} {shown}".rstrip(), sys.stdout)


def read_any(picture: Path) -> tuple[str, dict[str, Any]]:
    """Which program made a picture, and its settings in that program's words.

    Programs are "gspn2", "gspn2 upscale", "A1111" and "ComfyUI".

    Raises:
        CliError: the file cannot be read, is no picture or carries no settings.
    """
    from gspn2_diffusion.cli.foreign import parse_comfyui
    from gspn2_diffusion.cli.upscale import TEXT_KEY as UPSCALE_KEY
    from gspn2_diffusion.png_metadata import (
        JSON_KEY,
        TEXT_KEY,
        GenerationSettings,
        parse_parameters,
        read_text,
    )

    try:
        text = read_text(picture)
        if JSON_KEY in text:
            return "gspn2", dataclasses.asdict(GenerationSettings.from_json(text[JSON_KEY]))
        if UPSCALE_KEY in text:
            return "gspn2 upscale", dict(json.loads(text[UPSCALE_KEY]))
        if TEXT_KEY in text:
            return "A1111", dict(parse_parameters(text[TEXT_KEY]))
        if "prompt" in text:
            return "ComfyUI", dict(parse_comfyui(text["prompt"]))
    except OSError as error:
        raise CliError(f"{str(picture)!r} cannot be read: {error.strerror or describe(error)}") from error
    except ValueError as error:
        name, problem = repr(str(picture)), describe(error)
        raise CliError(problem if name in problem else f"{name}: {problem}") from error
    raise CliError(f"{str(picture)!r} carries no settings (texts: {', '.join(sorted(text)) or 'none'})")
