"""The ``gspn2`` command. ``python -m gspn2_diffusion`` is the same.

Nothing here imports torch before a command needs it: help and usage errors answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from gspn2_diffusion import __version__
from gspn2_diffusion.cli import batch, console, convert, doctor, generate, info, sheet, upscale, verify
from gspn2_diffusion.webapp import command as webapp_command

app = typer.Typer(
    name="gspn2",
    help="Text-to-image diffusion on a GSPN-2 backbone.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("generate")(generate.generate)
app.command("batch")(batch.batch)
app.command("info")(info.info)
app.command("sheet")(sheet.sheet)
app.command("upscale")(upscale.upscale)
app.command("convert")(convert.convert)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)
app.command("app")(webapp_command.app)


def _print_version(value: bool) -> None:
    if value:
        print(f"gspn2-diffusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """One command line, as a function.

    Args:
        arguments: without the program's name; None takes ``sys.argv``.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 3 some pictures failed, 130 interrupted. An error
        has been written to stderr, in one line.
    """
    console.reset_debug()
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        result: Any = typer.main.get_command(app).main(arguments, prog_name="gspn2", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = console.EXIT_INTERRUPTED
    except typer.Exit as error:
        result = error.exit_code
    except Exception as error:
        console.report(_as_usage_error(error))
        return int(getattr(error, "exit_code", console.EXIT_FAILURE))
    if result == console.EXIT_INTERRUPTED:
        console.say("interrupted")
    return result if isinstance(result, int) else 0


def _as_usage_error(error: Exception) -> Exception:
    """The parser's own exceptions, whose classes differ between typer versions, in our words."""
    if not hasattr(error, "format_message"):
        return error
    command = getattr(getattr(error, "ctx", None), "command_path", "gspn2")
    return console.UsageError(f"{error.format_message().rstrip('.')} (see {command} --help)")


def main() -> NoReturn:
    """Entry point of the ``gspn2`` program."""
    sys.exit(run())


__all__ = ["app", "main", "run"]
