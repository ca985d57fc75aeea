"""Ctrl+C that lets a command finish what it has in hand."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from gspn2_diffusion.cli.console import say


class StopFlag:
    """Within the block the first Ctrl+C (or SIGTERM) only makes this true; the second interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
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

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        say("stopping after what is in hand; once more to stop at once")
