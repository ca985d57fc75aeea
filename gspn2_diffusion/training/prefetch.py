"""Items made ahead of time in a thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """Makes items first, first + 1, ... in a thread, so that Python work never stalls the device.

    Args:
        make: called with the number of the item.
        first: number of the first item.
        depth: items kept ready.
    """

    def __init__(self, make: Callable[[int], Made], first: int = 0, depth: int = 16) -> None:
        self.wait_seconds = 0.0
        self._queue: queue.Queue[Made | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make, first), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Made], number: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Made | BaseException = make(number)
            except Exception as error:
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            number += 1

    def get(self) -> Made:
        """The next item; an error in the thread is raised here."""
        started = time.monotonic()
        item = self._queue.get()
        self.wait_seconds += time.monotonic() - started
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(timeout=5)
