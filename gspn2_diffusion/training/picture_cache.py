"""Pictures and captions encoded once, kept on the disk, and found again by what they were made with."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, stack

from gspn2_diffusion.files import model_hash
from gspn2_diffusion.training.buckets import Buckets
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.frozen import FrozenModels
from gspn2_diffusion.training.picture_files import DamagedPictureError, read_rgb
from gspn2_diffusion.training.picture_sources import Item
from gspn2_diffusion.training.rows import RowStore, digest, missing

_WINDOW, _THREADS = 32, 4
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Entry:
    """One picture that can be trained on: its name and the keys of its latents and captions."""

    name: str
    latents: str
    texts: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass
class Damage:
    """Pictures that were skipped, and why."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        """Note one picture."""
        self.rows.append({"picture": name, "reason": reason})

    def summary(self) -> str:
        """How many, by reason."""
        kinds = Counter(row["reason"].split(":")[0] for row in self.rows)
        return ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))

    def write(self, path: Path) -> None:
        """One JSON line each."""
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(part, path)


class PictureCache:
    """Latents and text states of a run's pictures.

    The folders are named after the content of the models' files, the type they run in and the transform, so
    after any change other folders are used and a stale row is never read.

    Args:
        folder: root of the cache; several runs and data sets may share it.
        models: the frozen models.
        vae_folder, text_folders: where they were loaded from, to name them by content.
        buckets: sizes of the pictures.
        caption: for pictures that have none.
    """

    def __init__(
        self,
        folder: Path,
        models: FrozenModels,
        *,
        vae_folder: Path,
        text_folders: Sequence[Path],
        buckets: Buckets,
        caption: str | None = None,
        min_side: int = 1,
    ) -> None:
        self.models, self.buckets, self._caption, self._min_side = models, buckets, caption, min_side
        about_latents = {
            "vae": model_hash(vae_folder),
            "dtype": str(models.vae.dtype),
            "transform": f"cover, centre crop, Lanczos; {buckets}; at least {min_side} px",
        }
        about_text = {
            "models": [model_hash(text_folder) for text_folder in text_folders],
            "dtype": str(models.text_encoder.dtype),
            "tokens": models.max_text_tokens,
        }
        self.latents = RowStore(folder / f"latents-{_short(about_latents)}", about_latents)
        self.texts = RowStore(folder / f"text-{_short(about_text)}", about_text)

    def fill(self, items: Iterable[Item], share: tuple[int, int], damage: Damage) -> list[Entry]:
        """Encode what is missing; all entries, in the order of the data, also those that others encode.

        Args:
            items: the pictures.
            share: (rank, processes): which of the missing pictures this process encodes.
            damage: collects what cannot be used.
        """
        entries: list[Entry] = []
        work = self._wanted(items, share, entries, damage)
        for name, key, pixels in _in_threads(self._decode, work):
            if isinstance(pixels, str):
                damage.add(name, pixels)
            else:
                self._gather(key, pixels)
        self._encode_all()
        self.latents.flush()
        self._encode_texts(
            [text for entry in entries for text in zip(entry.texts, entry.captions, strict=True)], share
        )
        return entries

    def usable(self, entries: Iterable[Entry]) -> list[Entry]:
        """After all processes have filled the cache: the entries that are in it."""
        self.latents.reload()
        self.texts.reload()
        return [e for e in entries if e.latents in self.latents and not missing(self.texts, e.texts)]

    def _wanted(
        self, items: Iterable[Item], share: tuple[int, int], entries: list[Entry], damage: Damage
    ) -> Iterator[tuple[Item, str]]:
        seen: set[str] = set()
        self._ready: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for number, item in enumerate(items):
            captions = item.captions or ((self._caption,) if self._caption else ())
            mine = number % share[1] == share[0]
            if not captions:
                if mine:
                    damage.add(item.name, "no caption")
                continue
            key = digest(item.key)
            entries.append(Entry(item.name, key, tuple(digest(text) for text in captions), captions))
            if mine and key not in self.latents and key not in seen:
                seen.add(key)
                yield item, key

    def _decode(self, work: tuple[Item, str]) -> tuple[str, str, Tensor | str]:
        item, key = work
        try:
            return item.name, key, self.buckets.fit(read_rgb(item.read(), min_side=self._min_side))
        except (DamagedPictureError, OSError) as error:
            return item.name, key, str(error) or type(error).__name__

    def _gather(self, key: str, pixels: Tensor) -> None:
        """Keep a picture until a batch of its size is full: about four million pixels."""
        ready = self._ready.setdefault(tuple(pixels.shape), [])
        ready.append((key, pixels))
        if len(ready) >= max(1, 2**22 // pixels[0].numel()):
            self._encode(self._ready.pop(tuple(pixels.shape)))

    def _encode_all(self) -> None:
        while self._ready:
            self._encode(self._ready.popitem()[1])

    def _encode(self, ready: list[tuple[str, Tensor]]) -> None:
        latents = self.models.latents(stack([pixels for _, pixels in ready])).half()
        for (key, _), row in zip(ready, latents, strict=True):
            self.latents.add(key, {"latents": row})

    def _encode_texts(self, wanted: list[tuple[str, str]], share: tuple[int, int]) -> None:
        captions = {key: text for key, text in wanted if key not in self.texts}
        own = list(captions.items())[share[0] :: share[1]]
        for start in range(0, len(own), _WINDOW):
            part = own[start : start + _WINDOW]
            states = self.models.texts([text for _, text in part])
            for row, (key, _) in enumerate(part):
                values = {
                    "hidden": states.hidden[row],
                    "mask": states.mask[row],
                    "pooled": states.pooled[row],
                }
                self.texts.add(key, values)
        self.texts.flush()


def check_not_empty(data: str, entries: Sequence[Entry], damage: Damage) -> None:
    """Raise ConfigError, with the reasons, when no picture is left to train on."""
    if not entries:
        raise ConfigError(
            f"`data`: {data} has no usable picture with a caption ({damage.summary() or 'it is empty'}); "
            "give metadata.jsonl or .txt files beside the pictures, or one `caption` for all"
        )


def _short(about: dict[str, Any]) -> str:
    return digest(json.dumps(about, sort_keys=True))[:16]


def _in_threads(work: Callable[[Any], Kind], items: Iterable[Any]) -> Iterator[Kind]:
    """`work` on items in order, a window of them at a time, decoded side by side."""
    source = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        while window := list(islice(source, _WINDOW)):
            yield from pool.map(work, window)
