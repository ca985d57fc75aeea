"""Files: replacing one in a single step, and naming a model by its content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Written by libraries when a model is saved; the model is the same with other values.
_BOOKKEEPING_KEYS = ("_diffusers_version", "_name_or_path", "transformers_version", "_commit_hash")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to ``path`` if the block ends well, else removed."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files, a picture is not one
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_UMASK_LOCK = threading.Lock()


def _umask() -> int:
    with _UMASK_LOCK:  # asking means setting: two threads at once would leave the wrong one behind
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def model_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a diffusers folder that decide what it draws: configs, tokenizer, weights; sorted."""
    folder = Path(folder)
    found = (item for pattern in ("*.json", "*.safetensors", "*.txt") for item in folder.rglob(pattern))
    return sorted(
        item for item in found if not any(part.startswith(".") for part in item.relative_to(folder).parts)
    )


def model_hash(folder: str | os.PathLike[str]) -> str:
    """SHA-256 (64 hex digits) over the names and contents of :func:`model_files`.

    JSON counts by meaning: layout, order of keys and the version of the library that saved it do not matter.
    """
    digest = hashlib.sha256()
    for item in model_files(folder):
        digest.update(item.relative_to(folder).as_posix().encode() + b"\0" + _content_hash(item))
    return digest.hexdigest()


def _content_hash(path: Path) -> bytes:
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):
            data = _without_bookkeeping(json.loads(path.read_text(encoding="utf-8")))
            return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).digest()
    return _digest(path).digest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 (64 hex digits) of one file's bytes."""
    return _digest(Path(path)).hexdigest()


def _digest(path: Path) -> hashlib._Hash:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def _without_bookkeeping(data: Any) -> Any:
    return {k: v for k, v in data.items() if k not in _BOOKKEEPING_KEYS} if isinstance(data, dict) else data
