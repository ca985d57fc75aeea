"""One thread for all drawing, and memory that goes back to the system afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_M_ARENA_MAX = -8  # of glibc's mallopt
_ARENAS = 2


class Worker:
    """Runs functions one after the other in a thread of its own, until it is closed.

    glibc keeps freed memory apart for each thread: with a new thread for every request a server that draws
    on the CPU would grow until every such store has seen the largest picture.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], None]) -> threading.Event:
        """Returns at once; the event is set when ``function`` has ended, well or not."""
        done = threading.Event()
        self._jobs.put((function, done))
        return done

    def close(self) -> None:
        """Ends the thread after the jobs that it has; once more is harmless.

        An interpreter that ends while a thread is inside torch is aborted (SIGABRT).
        """
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, done = job
            try:
                function()
            except Exception:
                logger.exception("a job of the worker failed")
            finally:
                del function, job
                give_back()
                done.set()


def _libc() -> ctypes.CDLL | None:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim, libc.mallopt  # noqa: B018  (other C libraries have neither)
        return libc
    return None


def keep_few_arenas() -> None:
    """Lets the threads of the server share freed memory; without effect elsewhere than on glibc."""
    if libc := _libc():
        libc.mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Returns freed memory to the system; without effect elsewhere than on glibc."""
    if libc := _libc():
        libc.malloc_trim(0)
