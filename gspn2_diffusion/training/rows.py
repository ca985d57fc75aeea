"""Rows of tensors on the disk, found by key: the cache of latents and text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ROWS_PER_FILE, BYTES_PER_FILE = 1024, 2**27


def digest(*parts: str) -> str:
    """32 hex digits that follow from the texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


class RowStore:
    """A folder of safetensors files, each holding rows of one shape and their keys.

    A file appears when it is whole (temporary name, then rename), so a killed writer leaves no half row. The
    files are mapped, not read: what is drawn from is cached by the operating system.

    Args:
        folder: made if it is not there.
        about: what the rows were made with, written beside them.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if about is not None and not (folder / "about.json").exists():
            part = folder / f"about.json.{os.getpid()}.part"
            part.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(part, folder / "about.json")
        self._waiting: dict[tuple[Any, ...], list[tuple[str, dict[str, Tensor]]]] = {}
        self.reload()

    def reload(self) -> list[str]:
        """Look at the files again, for those of other processes; returns the names of damaged ones."""
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[dict[str, Tensor]] = []
        damaged = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    keys = json.loads(file.metadata()["keys"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                damaged.append(path.name)
                continue
            self._places.update((key, (len(self._files), row)) for row, key in enumerate(keys))
            self._files.append(tensors)
        return damaged

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        """Shape of one row's tensor."""
        file, _ = self._places[key]
        return tuple(self._files[file][name].shape[1:])

    def add(self, key: str, row: dict[str, Tensor]) -> None:
        """Keep a row for the next file; `flush` writes what is left over."""
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(row.items()))
        waiting = self._waiting.setdefault(shapes, [])
        waiting.append((key, {name: value.detach().cpu() for name, value in row.items()}))
        size = sum(value.numel() * value.element_size() for value in row.values())
        if len(waiting) >= ROWS_PER_FILE or len(waiting) * size >= BYTES_PER_FILE:
            self._write(self._waiting.pop(shapes))

    def flush(self) -> None:
        """Write all rows that still wait."""
        for rows in self._waiting.values():
            self._write(rows)
        self._waiting.clear()

    def _write(self, rows: list[tuple[str, dict[str, Tensor]]]) -> None:
        keys = [key for key, _ in rows]
        tensors = {name: torch.stack([row[name] for _, row in rows]) for name in rows[0][1]}
        target = self.folder / f"{digest(*keys)}.safetensors"
        part = target.with_suffix(f".{os.getpid()}.part")
        try:
            save_file(tensors, part, metadata={"keys": json.dumps(keys)})
            os.replace(part, target)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"cannot write the cache {target}: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of several keys, stacked in their order; they must have one shape."""
        places = [self._places[key] for key in keys]
        first = self._files[places[0][0]]
        found = {
            name: torch.empty((len(keys), *value.shape[1:]), dtype=value.dtype)
            for name, value in first.items()
        }
        for file in {place[0] for place in places}:
            slots = [slot for slot, place in enumerate(places) if place[0] == file]
            picked = torch.tensor([places[slot][1] for slot in slots])
            for name, value in self._files[file].items():
                found[name][slots] = value[picked]
        return found


def missing(store: RowStore, keys: Iterable[str]) -> list[str]:
    """Those of the keys that the store has no row for, without repeats."""
    return [key for key in dict.fromkeys(keys) if key not in store]
