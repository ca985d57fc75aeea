"""What goes wrong, as a sentence for the person at the page; the detail goes to the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)

UNEXPECTED = "Something went wrong while working on this. The server's log says more."


class AppError(Exception):
    """A failure whose message is a sentence fit for a stranger: no path, no internals."""


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
