"""What goes wrong, as a sentence for the person at the page; the detail goes to the log."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

UNEXPECTED = "Something went wrong while working on this. The server's log says more."


class AppError(Exception):
    """A failure whose message is a sentence fit for a stranger: no path, no internals."""


def sentences_without_tracebacks() -> None:
    """Keeps ``gradio.Error`` out of the log unless it is told otherwise.

    It is a sentence for the visitor, raised by us or by Gradio's checks of values, such as a number outside a
    slider. Gradio would print a traceback for each, in which those of real failures drown.
    """
    import gradio

    original = gradio.Error.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def quiet(self: gradio.Error, *args: Any, **options: Any) -> None:
        original(self, *args, **{"print_exception": False, **options})

    gradio.Error.__init__ = quiet  # type: ignore[method-assign]


@contextlib.contextmanager
def as_sentences(what: str) -> Iterator[None]:
    """Lets :class:`AppError` pass; logs every other exception with ``what`` and raises one in its place."""
    try:
        yield
    except (AppError, GeneratorExit):
        raise
    except Exception as error:
        logger.exception("%s failed", what)
        raise AppError(UNEXPECTED) from error


def gone_away(request: Any, error: Exception) -> Any:
    """Nobody reads this answer: a visitor left while sending a picture, which is no failure of the server."""
    from starlette.responses import Response

    logger.info("a visitor left during %s", request.url.path)
    return Response(status_code=400)
