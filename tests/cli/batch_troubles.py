"""``gspn2 batch`` in a process of its own that is killed or interrupted at an exact place of its work."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import forked


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_drawing(number: int) -> None:
    """SIGKILL in denoising step `number`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    whole, calls = FlowMatchEulerDiscreteScheduler.step, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            kill()
        return whole(*arguments, **options)

    FlowMatchEulerDiscreteScheduler.step = broken


def kill_in_file(number: int) -> None:
    """SIGKILL when half of picture `number` is written."""
    from gspn2_diffusion import png_metadata

    whole, calls = png_metadata.atomic_path, []

    @contextlib.contextmanager
    def broken(path: Path) -> Iterator[Path]:
        with whole(path) as temporary:
            yield temporary
            calls.append(1)
            if len(calls) == number:
                os.truncate(temporary, temporary.stat().st_size // 2)
                kill()

    png_metadata.atomic_path = broken  # type: ignore[assignment]


def kill_before_line(number: int) -> None:
    """SIGKILL between saving picture `number` and writing its line."""
    _before_append(number, kill)


def kill_in_line(number: int) -> None:
    """SIGKILL when half of line `number` is written."""
    from gspn2_diffusion.batch import manifest

    calls = []

    class HalfWritten:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: memoryview) -> int:
            calls.append(1)
            if len(calls) == number:
                os.write(descriptor, data[: len(data) // 2])
                kill()
            return os.write(descriptor, data)

    manifest.os = HalfWritten()  # type: ignore[assignment]


def interrupt(number: int) -> None:
    """Ctrl+C just before line `number` is written."""
    _before_append(number, lambda: os.kill(os.getpid(), signal.SIGINT))


def _before_append(number: int, action: Callable[[], None]) -> None:
    from gspn2_diffusion.batch import manifest

    whole, lines = manifest.append, []

    def broken(folder: Path, records: Iterable[manifest.Record]) -> None:
        found = list(records)
        before = len(lines)
        lines.extend(found)
        if before < number <= len(lines):
            action()
        whole(folder, found)

    manifest.append = broken


TROUBLES = {f.__name__: f for f in (kill_in_drawing, kill_in_file, kill_before_line, kill_in_line, interrupt)}


def command(trouble: str, number: int, arguments: list[str]) -> None:
    """Runs in the child."""
    TROUBLES[trouble](number)
    forked.command(arguments, {})


def start(trouble: str, number: int, *arguments: object) -> BaseProcess:
    """``gspn2 ...`` in a new process that meets the trouble."""
    process = forked.CONTEXT.Process(target=command, args=(trouble, number, [str(a) for a in arguments]))
    process.start()
    return process
