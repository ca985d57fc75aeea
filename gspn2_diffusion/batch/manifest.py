"""``manifest.jsonl``: one line per picture, safe against kill -9 and several writers."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: one process at a time is up to the user
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.jsonl"
LOCK = ".gspn2-batch.lock"
SEED_FILE = ".gspn2-batch.json"

Record = dict[str, Any]


class BusyError(OSError):
    """Another run is at work in the same folder."""


@contextlib.contextmanager
def occupy(folder: Path, rank: int) -> Iterator[None]:
    """Keeps a second run out of ``folder`` within the block; the ranks of one run do not hinder each other.

    Raises:
        BusyError: another process holds the same rank.
    """
    with (folder / LOCK).open("a+b") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
            except OSError:
                raise BusyError(f"another run is at work in {str(folder)!r}") from None
        yield  # closing the file, or dying, gives the lock back


def base_seed(folder: Path, store: bool = True) -> int:
    """The random number from which prompts without a seed get theirs: drawn once for a folder, then kept.

    Several processes may ask at once; all get the same number.
    """
    path = folder / SEED_FILE
    if not path.exists():
        seed = secrets.randbelow(2**32)
        if not store:
            return seed
        handle, temporary = tempfile.mkstemp(prefix=".seed", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "w") as file:
            json.dump({"seed": seed}, file)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename it never replaces what another process stored
        os.unlink(temporary)
    try:
        return int(json.loads(path.read_text())["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{str(path)!r} is damaged: {error}") from None


def append(folder: Path, records: Iterable[Record]) -> None:
    """Adds lines and waits until they are on the disk.

    One write in append mode under a lock, so lines of several processes never mix. What a killed process left
    of a line is closed with a line break first.
    """
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    descriptor = os.open(folder / MANIFEST, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            text = "\n" + text
        data = memoryview(text.encode())
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> dict[str, Record]:
    """The last record of each picture by its key. Torn lines are skipped: their pictures are drawn again."""
    records: dict[str, Record] = {}
    with contextlib.suppress(FileNotFoundError), (folder / MANIFEST).open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("key"), str):
                    records[record["key"]] = record
    return records


def is_finished(folder: Path, record: Record | None, suffix: str) -> bool:
    """Whether a record's picture is there, whole, and in the wanted format."""
    if record is None or record.get("status") != "done" or not str(record.get("file")).endswith(suffix):
        return False
    try:
        return (folder / record["file"]).stat().st_size == record.get("bytes")
    except OSError:
        return False
