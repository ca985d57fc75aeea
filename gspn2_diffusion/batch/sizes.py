"""How many pictures to draw at once: a fixed number, or the most that fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

FIRST = 8
"""Pictures of the first automatic batch, from which the memory of one is measured."""
GROWTH = 8
SHARE = 0.85
"""Of the free memory that a batch may need by what was measured."""
MAX_PIXELS = 2**24
"""Of an automatic batch: 256 pictures of 256x256. A GPU is busy with less, and kernels with 32-bit indices
end at a few times more."""
TAIL = 32
"""Automatic batches get smaller towards the end, to this many pictures: what is drawn last is also encoded
last, while the GPU has nothing to do."""


class Memory(Protocol):
    """What a device says about its memory, in bytes."""

    def used(self) -> int: ...
    def peak(self) -> int: ...
    def reset_peak(self) -> None: ...
    def free(self) -> int: ...


class CudaMemory:
    """:class:`Memory` of a GPU, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used(self) -> int:
        import torch

        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)

    def free(self) -> int:
        """Including what torch has reserved but does not use."""
        import torch

        outside = torch.cuda.mem_get_info(self._device)[0]
        return outside + torch.cuda.memory_reserved(self._device) - self.used()


@dataclass
class BatchSizes:
    """Chooses sizes by height and width of the pictures, and learns from what fits and what does not.

    Attributes:
        largest: the most pictures at once; None to find out.
        memory: what to find it out with, None where ``largest`` is given.
    """

    largest: int | None
    memory: Memory | None = None
    _limits: dict[tuple[int, int], int] = field(default_factory=dict)
    _next: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: int | None, device: torch.device) -> BatchSizes:
        """For ``--batch-size``; automatic on a CPU is 1: alone, a picture is bitwise the same every time."""
        if wanted is None and device.type == "cuda":
            return cls(None, CudaMemory(device))
        return cls(wanted or 1)

    def choose(self, height: int, width: int, left: int) -> int:
        """Size of the next batch, of ``left`` pictures that are to be drawn."""
        limit = self._limits.get((height, width), left)
        if self.largest is not None:
            return min(self.largest, limit, left)
        most = max(1, MAX_PIXELS // (height * width))
        wanted = min(self._next.get((height, width), FIRST), max(TAIL, -(-left // 4)))
        return max(1, min(wanted, most, limit, left))

    def shrink(self, height: int, width: int, count: int) -> int:
        """Notes that ``count`` pictures did not fit; returns the number to try next, at least 1."""
        size = max(1, count // 2)
        self._limits[height, width] = size
        return size

    @contextlib.contextmanager
    def observe(self, height: int, width: int, count: int) -> Iterator[None]:
        """Around the drawing of ``count`` pictures: what they need decides the next batch's size."""
        if self.memory is None:
            yield
            return
        self.memory.reset_peak()
        before = self.memory.used()
        yield
        each = max(1.0, (self.memory.peak() - before) / count)
        fitting = int(SHARE * self.memory.free() / each)
        if (height, width) not in self._limits:
            self._next[height, width] = max(1, min(fitting, GROWTH * count))
