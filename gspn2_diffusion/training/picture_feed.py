"""Batches of cached pictures, in an order that follows from the seed and the number of the batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from gspn2_diffusion.training.latents import LatentBatch
from gspn2_diffusion.training.picture_cache import Entry
from gspn2_diffusion.training.prefetch import Prefetcher
from gspn2_diffusion.training.rows import RowStore
from gspn2_diffusion.training.text import TextStates


class BatchPlan:
    """Which pictures, and which of their captions, stand in batch number n of a run.

    Every epoch shuffles the pictures of each bucket, cuts them into batches of one size and shuffles the
    batches. A bucket's last batch is filled up from its beginning, so every picture is seen in every epoch.
    The plan is the same for every number of processes: they take turns.

    Args:
        entries: the pictures.
        shapes: latent shape of each.
        batch_size: pictures in a batch.
        seed: decides the order.
    """

    def __init__(
        self, entries: Sequence[Entry], shapes: Sequence[tuple[int, ...]], batch_size: int, seed: int
    ) -> None:
        self._entries, self._batch_size, self._seed = entries, batch_size, seed
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            self._groups.setdefault(shape, []).append(index)
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups.values())
        self._epoch: tuple[int, list[list[int]]] | None = None

    def batch(self, number: int) -> list[tuple[Entry, int]]:
        """Entries of a batch, each with the number of the caption that is used."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._shuffled(epoch))
        chooser = random.Random(f"{self._seed} {number} captions")
        found = [self._entries[index] for index in self._epoch[1][place]]
        return [(entry, chooser.randrange(len(entry.texts))) for entry in found]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        shuffler = random.Random(f"{self._seed} {epoch} order")
        batches = []
        for group in self._groups.values():
            order = shuffler.sample(group, len(group))
            for start in range(0, len(order), self._batch_size):
                part = order[start : start + self._batch_size]
                while len(part) < self._batch_size:
                    part = part + order[: self._batch_size - len(part)]
                batches.append(part)
        shuffler.shuffle(batches)
        return batches


def read_batch(latents: RowStore, texts: RowStore, chosen: Sequence[tuple[Entry, int]]) -> LatentBatch:
    """Rows of a batch on the CPU, as they are stored."""
    words = texts.rows([entry.texts[caption] for entry, caption in chosen])
    pictures = latents.rows([entry.latents for entry, _ in chosen])["latents"]
    return LatentBatch(pictures, TextStates(words["hidden"], words["mask"], words["pooled"]))


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """A batch as the denoiser takes it: latents float32."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    text = batch.text
    states = TextStates(move(text.hidden), move(text.mask), move(text.pooled))
    return LatentBatch(move(batch.latents).float(), states)


class PictureFeed:
    """The batches of one process, read ahead in a thread.

    Args:
        plan: what stands in which batch.
        latents, texts: the cached rows.
        first: number of this process's first batch; `stride` further comes the next.
        stride: number of processes.
        device: where batches are wanted.
        depth: batches read ahead.
    """

    def __init__(
        self,
        plan: BatchPlan,
        latents: RowStore,
        texts: RowStore,
        *,
        first: int,
        stride: int,
        device: torch.device,
        depth: int,
    ) -> None:
        self._device = device
        gpu: int | None = None
        if device.type == "cuda":  # a single process's device has no index
            gpu = torch.cuda.current_device() if device.index is None else device.index

        def make(count: int) -> LatentBatch:
            batch = read_batch(latents, texts, plan.batch(first + count * stride))
            if gpu is None:
                return batch
            torch.cuda.set_device(gpu)  # a new thread starts on the first GPU
            text = batch.text
            pinned = TextStates(text.hidden.pin_memory(), text.mask.pin_memory(), text.pooled.pin_memory())
            return LatentBatch(batch.latents.pin_memory(), pinned)

        self._prefetcher = Prefetcher(make, 0, depth)

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for batches."""
        return self._prefetcher.wait_seconds

    def next(self) -> LatentBatch:
        """The next batch, on the device."""
        return to_device(self._prefetcher.get(), self._device)

    def close(self) -> None:
        """End the thread."""
        self._prefetcher.close()
