"""First come, first served: who may use the model now, and how many are before you."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Hashable, Iterator

from gspn2_diffusion.webapp.errors import AppError


class Line:
    """Tickets in the order they were drawn. The first one is being served."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._tickets: list[int] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    def join(self) -> int:
        """A ticket at the end of the line.

        Raises:
            AppError: the line is full.
        """
        with self._changed:
            if len(self._tickets) >= self._longest:
                raise AppError(f"{len(self._tickets)} requests are waiting already; please try again later.")
            ticket = next(self._numbers)
            self._tickets.append(ticket)
            return ticket

    def leave(self, ticket: int) -> None:
        """Gives the ticket back, whether served or not; twice is harmless."""
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def position(self, ticket: int) -> int:
        """0 when it is this ticket's turn."""
        with self._changed:
            return self._tickets.index(ticket)

    def wait(self, ticket: int, seconds: float) -> int:
        """The position, once it is 0 or after at most ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._tickets[0] == ticket, seconds)
            return self._tickets.index(ticket)

    def __len__(self) -> int:
        with self._changed:
            return len(self._tickets)


class Running:
    """The stop signals of what each visitor has asked for."""

    def __init__(self) -> None:
        self._signals: dict[Hashable, set[threading.Event]] = {}
        self._lock = threading.Lock()

    def start(self, visitor: Hashable) -> threading.Event:
        """A fresh stop signal of ``visitor``."""
        signal = threading.Event()
        with self._lock:
            self._signals.setdefault(visitor, set()).add(signal)
        return signal

    def end(self, visitor: Hashable, signal: threading.Event) -> None:
        with self._lock:
            signals = self._signals.get(visitor, set())
            signals.discard(signal)
            if not signals:
                self._signals.pop(visitor, None)

    def stop(self, visitor: Hashable) -> int:
        """Sets the signals of ``visitor``; returns how many there were."""
        with self._lock:
            signals = list(self._signals.get(visitor, ()))
        for signal in signals:
            signal.set()
        return len(signals)

    def stop_all(self) -> None:
        """Sets the signals of everybody."""
        with self._lock:
            visitors = list(self._signals)
        for visitor in visitors:
            self.stop(visitor)


class Once:
    """Lets a second click on a button do nothing while the first one is served.

    Gradio can do this in the browser, but there a click is still lost a moment after the page said "Done".
    """

    def __init__(self) -> None:
        self._held: set[Hashable] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, key: Hashable) -> Iterator[bool]:
        """Gives True, and holds ``key`` until the block ends; False if somebody holds it."""
        with self._lock:
            free = key not in self._held
            self._held.add(key)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._held.discard(key)
