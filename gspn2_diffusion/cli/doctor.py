"""``gspn2 doctor``: what is installed, what will run, and does it work."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from gspn2_diffusion.cli import checks, options
from gspn2_diffusion.cli.console import EXIT_FAILURE, CliError, err_console, quiet_libraries

_COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}

_ALL: dict[str, Callable[[], Iterator[checks.Check]]] = {
    "python": checks.check_python,
    "packages": checks.check_packages,
    "torch": checks.check_torch,
    "imports": checks.check_imports,
    "driver": checks.check_driver,
    "GPU": checks.check_gpus,
    "CuPy": checks.check_cupy,
    "backend": checks.check_backend,
    "kernels": checks.check_kernels,
    "scan": checks.check_scan,
    "model": checks.check_model,
}
_PREWARM = ("torch", "GPU", "CuPy", "backend", "kernels")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Write the report as JSON.")] = False,
    prewarm: Annotated[
        bool,
        typer.Option(
            "--prewarm",
            help="Only compile the kernels into the disk cache: the first picture then need not wait.",
        ),
    ] = False,
    debug: options.DebugOption = False,
) -> None:
    """Show what is installed and which backend will run, and try it.

    Ends with 1 if something that is needed does not work. A machine without a GPU is fine; a GPU that torch
    sees but on which the kernels cannot run is not.
    """
    with quiet_libraries():
        rows = list(_collect(_PREWARM if prewarm else tuple(_ALL)))
    if prewarm and not any(row.name.startswith(("kernels", "backend ")) for row in rows):
        raise CliError("--prewarm: torch sees no CUDA GPU to compile kernels for")
    broken = [row.name for row in rows if row.status == "broken"]
    if as_json:
        report = {"ok": not broken, "checks": [dataclasses.asdict(row) for row in rows]}
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print_table(rows)
    if broken:
        typer.echo(f"error: not working: {', '.join(broken)}", err=True)
        raise typer.Exit(EXIT_FAILURE)


def _collect(names: tuple[str, ...]) -> Iterator[checks.Check]:
    with err_console().status("checking") as status:
        for name in names:
            status.update(f"checking {name}")
            yield from checks.guarded(name, _ALL[name])


def _print_table(rows: list[checks.Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "status", "value", "detail", box=None, pad_edge=False)
    for row in rows:
        # Text, not str: a detail may hold brackets that rich would take for markup.
        table.add_row(
            Text(row.name), Text(row.status, style=_COLOURS[row.status]), Text(row.value), Text(row.detail)
        )
    console = Console(highlight=False)
    if not sys.stdout.isatty():  # a file or a pipe has no width to fit
        console = Console(highlight=False, width=200, soft_wrap=False)
    console.print(table)
