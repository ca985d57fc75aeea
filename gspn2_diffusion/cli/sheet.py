"""``gspn2 sheet``: a contact sheet of what ``gspn2 batch`` drew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gspn2_diffusion.batch import manifest
from gspn2_diffusion.cli import options
from gspn2_diffusion.cli.console import CliError, UsageError, describe, say
from gspn2_diffusion.files import atomic_path

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 2**28


def sheet(
    folder: Annotated[Path, typer.Argument(help="The --out of gspn2 batch.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="PNG, JPEG or WebP file to write.", show_default=False)
    ],
    columns: Annotated[
        int | None,
        typer.Option("--columns", "-c", min=1, help="Pictures in a row; about a square by default."),
    ] = None,
    size: Annotated[int, typer.Option("--size", min=16, max=2048, help="Pixels of a picture's side.")] = 192,
    labels: Annotated[
        bool, typer.Option("--labels/--no-labels", help="Prompt and seed below each picture.")
    ] = True,
    debug: options.DebugOption = False,
) -> None:
    """Put the pictures of a folder on one page, in the order of their list.

    Exit codes: 0 written, 1 error, 2 wrong usage.
    """
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}, got {str(output)!r}")
    try:
        records = [r for r in manifest.read(folder).values() if manifest.is_finished(folder, r, "")]
        if not records:
            raise CliError(f"{str(folder)!r} holds no {manifest.MANIFEST} with finished pictures")
        if len(records) * size * size > MAX_PIXELS:
            raise UsageError(f"{len(records)} pictures of --size {size} are too many for a page")
        _write(folder, sorted(records, key=lambda record: record["index"]), output, columns, size, labels)
    except OSError as error:
        raise CliError(describe(error)) from error
    say(str(output), sys.stdout)


def _write(
    folder: Path, records: list[manifest.Record], output: Path, columns: int | None, size: int, labels: bool
) -> None:
    from gspn2_diffusion.batch.sheet import contact_sheet

    page = contact_sheet(folder, records, columns, size, labels)
    with atomic_path(output) as temporary:
        page.save(temporary, format=FORMATS[output.suffix.lower()])
