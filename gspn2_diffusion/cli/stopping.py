"""Ctrl+C that lets a command finish what it has in hand."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from gspn2_diffusion.cli.console import say


class StopFlag:
    """Within the block Ctrl+C and SIGTERM only make this true; a second Ctrl+C interrupts at once.

    SIGTERM never does: after Ctrl+C in a terminal, ``accelerate launch`` sends one to each process as well.
    """

    def __init__(self) -> None:
        self._asked = False
        self._interrupted = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._asked

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signal handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._asked:
            say("stopping after what is in hand; Ctrl+C once more stops at once")
        self._asked = True
        self._interrupted = self._interrupted or number == signal.SIGINT
