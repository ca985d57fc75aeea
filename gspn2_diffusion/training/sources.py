"""Where latents come from: scenes composed on the device, or pictures encoded once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor

from gspn2_diffusion.training.buckets import Buckets
from gspn2_diffusion.training.captions import SceneWriter
from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.data import split_records, sprites_for
from gspn2_diffusion.training.frozen import FrozenModels
from gspn2_diffusion.training.latents import LatentBatch, SceneEncoder
from gspn2_diffusion.training.picture_cache import Damage, Entry, PictureCache, check_not_empty
from gspn2_diffusion.training.picture_feed import BatchPlan, PictureFeed, read_batch, to_device
from gspn2_diffusion.training.picture_sources import find_format, open_items
from gspn2_diffusion.training.rows import digest
from gspn2_diffusion.training.runtime import Run
from gspn2_diffusion.training.scene_feeds import scene_feed
from gspn2_diffusion.training.scene_setup import scene_writer

_SCENE_STREAM, VALIDATION_STREAM = 21, 23


@dataclass
class FixedSet:
    """Validation pictures with their fixed noise and levels."""

    name: str
    batches: list[tuple[LatentBatch, Tensor, Tensor]]


class LatentSource(Protocol):
    """Batches of encoded pictures for one process."""

    prompts: list[str]

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""

    def draw(self, micro: int, generator: torch.Generator) -> LatentBatch:
        """The next batch; `micro` is 0 at the start of a step."""

    def fixed_sets(self) -> list[FixedSet]:
        """Validation sets; on the main process alone."""

    def describe(self, step: int) -> str:
        """What this process's batch of a step was made of."""

    def close(self) -> None:
        """End threads; say what was skipped."""


def even_levels(count: int, generator: torch.Generator) -> Tensor:
    """Levels that cover 0..1 evenly, in random order, (count,)."""
    return ((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=generator)]


class SceneSource:
    """Emoji scenes through a ring of latents in device memory.

    Args:
        run: the run.
        config: settings.
        encoder: makes latents.
        step: step that is trained next.
    """

    def __init__(self, run: Run, config: DenoiserConfig, encoder: SceneEncoder, step: int) -> None:
        self._run, self._config, self._encoder = run, config, encoder
        self.prompts: list[str] = []
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._refresh = config.refresh or max(1, per_step // 4)
        records = split_records(config, "train", config.groups, config.styles)
        self._sprites = sprites_for(run, records)
        self._writer = scene_writer(config, records, self._sprites)
        run.say(f"{len(records):,} training pictures, {self._refresh} new scenes a step")
        self._sets = self._make_sets() if run.is_main else []
        seed = (config.seed, run.rank, _SCENE_STREAM)
        self._feed = scene_feed(
            config, encoder, self._writer, self._sprites, seed=seed, step=step, refresh=self._refresh
        )

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for captions."""
        return self._feed.wait_seconds

    def draw(self, micro: int, generator: torch.Generator) -> LatentBatch:
        """A random draw of the ring, which takes up new scenes once a step."""
        if micro == 0:
            with torch.autocast(self._run.device.type, enabled=False):
                self._feed.advance()
        return self._feed.draw(self._config.batch_size, generator)

    def fixed_sets(self) -> list[FixedSet]:
        """Scenes of the training records, and of pairs that are never trained."""
        return self._sets

    def describe(self, step: int) -> str:
        """Scenes follow from these numbers alone."""
        return f"scenes of seed {self._config.seed}, rank {self._run.rank}, step {step}"

    def close(self) -> None:
        """End the caption thread."""
        self._feed.close()

    def _make_sets(self) -> list[FixedSet]:
        trained = self._fixed("train", self._writer, self._sprites)
        config, split = self._config, "unseen_pair"
        try:
            records = split_records(config, split, config.groups, config.styles)
        except ValueError as error:
            self._run.say(f"no validation on {split}: {error}")
            return [trained]
        sprites = sprites_of(self._run, records)
        writer = scene_writer(config, records, sprites, (split,))
        return [trained, self._fixed(split, writer, sprites)]

    def _fixed(self, name: str, writer: SceneWriter, sprites: Tensor) -> FixedSet:
        """Scenes that no training step draws, each with its noise and an evenly spread level."""
        count = -(-self._config.validation_scenes // self._refresh)
        generator = torch.Generator("cpu").manual_seed(VALIDATION_STREAM)
        levels = even_levels(count * self._refresh, generator)
        batches = []
        for number in range(count):
            written = self._encoder.write(writer, self._refresh, (VALIDATION_STREAM, number))
            batch = self._encoder.encode(written, sprites)
            noise = torch.randn(batch.latents.shape, generator=generator).to(self._run.device)
            part = levels[number * self._refresh : (number + 1) * self._refresh]
            batches.append((batch, noise, part.to(self._run.device)))
        return FixedSet(name, batches)


def sprites_of(run: Run, records: Any) -> Tensor:
    """Sprites on one process alone, without waiting for the others."""
    from gspn2_diffusion.training.emoji import load_sprites

    config = run.config
    sprites = load_sprites(records, size=config.sprite_size, cache_dir=config.sprite_cache, errors="blank")
    return sprites.to(run.device)


def text_folders(config: DenoiserConfig) -> list[Path]:
    """Folders that decide what captions are turned into."""
    found = [config.component("text_encoder"), config.component("tokenizer")]
    second = found[0].with_name("text_encoder_2")
    return [*found, second] if second.is_dir() else found


class PictureSource:
    """The user's pictures: encoded once, cached on the disk, drawn by buckets.

    Args:
        run: the run.
        config: settings; ``config.data`` is where the pictures are.
        models: frozen models that encode.
        multiple: pixels that every side must be a multiple of.
        pictures: pictures trained on so far, the place in the data.
        step: step that is trained next.
        held_out: keep pictures apart for validation.
    """

    def __init__(
        self,
        run: Run,
        config: DenoiserConfig,
        models: FrozenModels,
        *,
        multiple: int,
        pictures: int,
        step: int,
        held_out: bool = True,
    ) -> None:
        self._run, self._config, self._step = run, config, step
        self._damage = Damage()
        self._cache = self._open_cache(models, multiple)
        entries = self._fill()
        self._held_out, self._entries = self._split(entries) if held_out else ([], entries)
        shapes = [self._cache.latents.shape(entry.latents, "latents") for entry in self._entries]
        run.say(
            f"{len(self._entries):,} pictures in {len(set(shapes))} sizes, {len(self._held_out)} held out"
        )
        self.prompts = [entry.captions[0] for entry in (self._held_out or self._entries)[:8]]
        self._plan = BatchPlan(self._entries, shapes, config.batch_size, config.seed)
        self._first = pictures // config.batch_size + run.rank
        self._feed = PictureFeed(
            self._plan,
            self._cache.latents,
            self._cache.texts,
            first=self._first,
            stride=run.world,
            device=run.device,
            depth=config.prefetch,
        )

    def _open_cache(self, models: FrozenModels, multiple: int) -> PictureCache:
        config = self._config
        return PictureCache(
            Path(config.cache_dir or self._run.output / "cache"),
            models,
            vae_folder=config.component("vae"),
            text_folders=text_folders(config),
            buckets=Buckets(config.resolution, multiple, config.max_aspect_ratio),
            caption=config.caption,
            min_side=config.min_picture_side,
        )

    def _fill(self) -> list[Entry]:
        run, config = self._run, self._config
        kind = find_format(config.data) if config.data_format == "auto" else config.data_format
        items = open_items(config.data, kind, config.image_column, config.caption_column, config.data_split)
        entries = self._cache.fill(items, (run.rank, run.world), self._damage)
        if run.world > 1:
            self._damage.rows = gather_object(self._damage.rows)
        run.accelerator.wait_for_everyone()
        usable = self._cache.usable(entries)
        if self._damage.rows and run.is_main:
            self._damage.write(run.output / "skipped.jsonl")
            self._say_damage()
        check_not_empty(config.data, usable, self._damage)
        return usable

    def _say_damage(self) -> None:
        count = len(self._damage.rows)
        self._run.say(f"{count} pictures were skipped ({self._damage.summary()}); see skipped.jsonl")

    def _split(self, entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Held-out pictures and the rest, which stay so when the data grow.

        Decided by a hash of what the cache knows pictures by: content, or path, size and time of files.
        """
        wanted = min(self._config.validation_pictures, len(entries) // 10)
        order = sorted(entries, key=lambda entry: digest(entry.latents, "held out"))
        chosen = {entry.latents for entry in order[:wanted]}
        return (
            [entry for entry in entries if entry.latents in chosen],
            [entry for entry in entries if entry.latents not in chosen],
        )

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for batches."""
        return self._feed.wait_seconds

    def draw(self, micro: int, generator: torch.Generator) -> LatentBatch:
        """The next batch of the plan."""
        return self._feed.next()

    def fixed_sets(self) -> list[FixedSet]:
        """The held-out pictures, and as many trained ones."""
        count = max(8, len(self._held_out), min(64, len(self._entries)))
        sets = {"train": self._entries[:count], "held_out": self._held_out}
        return [self._fixed(name, entries) for name, entries in sets.items() if entries]

    def describe(self, step: int) -> str:
        """Names of the pictures in this process's batches of a step."""
        accumulated = self._config.gradient_accumulation_steps
        names = []
        for micro in range(accumulated):
            number = self._first + ((step - self._step) * accumulated + micro) * self._run.world
            names += [entry.name for entry, _ in self._plan.batch(number)]
        return ", ".join(dict.fromkeys(names))

    def close(self) -> None:
        """End the thread; say again what was skipped."""
        self._feed.close()
        if self._damage.rows:
            self._say_damage()

    def _fixed(self, name: str, entries: Sequence[Entry]) -> FixedSet:
        generator = torch.Generator("cpu").manual_seed(VALIDATION_STREAM)
        by_shape: dict[tuple[int, ...], list[Entry]] = {}
        for entry in entries:
            by_shape.setdefault(self._cache.latents.shape(entry.latents, "latents"), []).append(entry)
        levels, batches = iter(even_levels(len(entries), generator).split(1)), []
        for group in by_shape.values():
            for start in range(0, len(group), self._config.batch_size):
                part = group[start : start + self._config.batch_size]
                rows = read_batch(self._cache.latents, self._cache.texts, [(entry, 0) for entry in part])
                batch = to_device(rows, self._run.device)
                noise = torch.randn(batch.latents.shape, generator=generator).to(self._run.device)
                sigmas = torch.cat([next(levels) for _ in part]).to(self._run.device)
                batches.append((batch, noise, sigmas))
        return FixedSet(name, batches)
