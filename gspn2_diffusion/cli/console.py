"""What reaches the screen: errors as one line, progress on stderr, no chatter of libraries."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

PACKAGE = __name__.partition(".")[0]


class CliError(Exception):
    """A failure with a message for the user. Ends the command with :data:`EXIT_FAILURE`."""

    exit_code = EXIT_FAILURE


class UsageError(CliError):
    """The command line is wrong. Ends the command with :data:`EXIT_USAGE`."""

    exit_code = EXIT_USAGE


class _Flags:
    """Set by the eager option ``--debug``, read where errors are reported."""

    debug = False


def set_debug(value: bool) -> bool:
    """Callback of ``--debug``."""
    _Flags.debug = _Flags.debug or value
    return value


def reset_debug() -> None:
    """Start of a command: only the environment decides until ``--debug`` is seen."""
    _Flags.debug = os.environ.get("GSPN2_DEBUG", "") not in ("", "0")


def debug() -> bool:
    """Whether tracebacks and library output are wanted (``--debug`` or GSPN2_DEBUG=1)."""
    return _Flags.debug


def err_console() -> Console:
    """A rich console on stderr, made anew so that it follows a redirected ``sys.stderr``.

    FORCE_COLOR and the like ask for colours in a file or a pipe, not for a bar that moves: only a terminal
    shows that.
    """
    return Console(stderr=True, highlight=False, force_terminal=sys.stderr.isatty())


def say(text: str, stream: TextIO | None = None) -> None:
    """One plain line on stderr (or ``stream``); characters the terminal cannot show are replaced."""
    stream = stream or sys.stderr
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(BrokenPipeError):
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def one_line(text: str) -> str:
    """``text`` with every run of white space, line breaks included, as one blank."""
    return " ".join(text.split())


def describe(error: BaseException) -> str:
    """An exception as one line; the type is named where the message alone would say nothing."""
    message = one_line(str(error))
    if isinstance(error, CliError | ValueError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def report(error: BaseException) -> None:
    """Write ``error: ...`` to stderr, after the traceback if :func:`debug` is on."""
    if debug():
        traceback.print_exception(error)
    say(f"error: {describe(error)}")


class _OneLineHandler(logging.Handler):
    """Log records on stderr, each text once: several pictures of one prompt need one note about it."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {one_line(record.getMessage())}"
        if line not in self._said:
            self._said.add(line)
            say(line)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block only warnings of this package reach the screen, each as one line.

    transformers, diffusers and torch log and warn about things that someone drawing a picture cannot act
    upon; ``--debug`` shows them all. The pipeline logs through the standard library under its module's name,
    so its notes, such as the one about a prompt that was cut, pass here.
    """
    if debug():
        yield
        return
    logger = logging.getLogger(PACKAGE)
    handler, propagate = _OneLineHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # else the same line again through the root logger
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "critical")  # read once, when the library is imported
    disabled = {
        name: logging.getLogger(name).level for name in ("transformers", "diffusers", "accelerate", "torch")
    }
    for name in disabled:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their errors are raised as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=rf"{PACKAGE}(\.|$)")
            warnings.showwarning = _show_warning
            yield
    finally:
        for name, level in disabled.items():
            logging.getLogger(name).setLevel(level)
        logger.removeHandler(handler)
        logger.propagate = propagate


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"warning: {one_line(str(message))}")


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Pause the garbage collector while large libraries are imported.

    Importing torch, diffusers and transformers makes millions of objects that live to the end. Collecting
    among them frees nothing and costs 2 to 3 s of the 13 s on a slow core.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what was imported is never garbage: later collections need not walk it
        if was_enabled:
            gc.enable()
