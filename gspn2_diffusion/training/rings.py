"""A ring of rows in device memory: the newest stay, the oldest are replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class TensorRing:
    """Tensors of equal length, written in chunks and drawn at random.

    Args:
        capacity: rows.
        rows: one chunk by names, which gives shapes, types and the device; `kinds` overrules types.
        kinds: types by name.
    """

    def __init__(
        self, capacity: int, rows: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self.capacity = capacity
        self.filled = 0
        self._rows = {
            name: torch.zeros(
                (capacity, *row.shape[1:]), dtype=(kinds or {}).get(name, row.dtype), device=row.device
            )
            for name, row in rows.items()
        }

    def write(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Replace the rows from `start` on, modulo the capacity, which the chunk must divide."""
        slot = start % self.capacity
        for name, values in rows.items():
            self._rows[name][slot : slot + len(values)].copy_(values)
            self.filled = max(self.filled, slot + len(values))

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` random rows, with repetition."""
        device = next(iter(self._rows.values())).device
        index = torch.randint(self.filled, (count,), device=device, generator=generator)
        return {name: rows.index_select(0, index) for name, rows in self._rows.items()}
