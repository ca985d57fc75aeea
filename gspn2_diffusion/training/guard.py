"""Stops a run whose numbers went bad, before anything bad is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.sharding import agree, is_sharded, local, whole


class TrainingDivergedError(RuntimeError):
    """A gradient was not finite; the last good checkpoint stays."""


class Guard:
    """Remembers, on the device, the first step whose gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, norm: Tensor, step: int) -> None:
        """Look at the gradient norm of a step; nothing waits for the device."""
        bad = ~torch.isfinite(whole(norm)) & (self._first < 0)
        self._first = torch.where(bad, step, self._first)

    def first_bad_step(self) -> int | None:
        """The first step with a gradient that was not finite; waits for the device."""
        first = int(self._first)
        return first if first >= 0 else None


def weights_are_finite(module: nn.Module) -> bool:
    """Whether every weight is finite on every process; all must call when the weights are split."""
    weights = [local(param.detach()) for param in module.parameters() if param.requires_grad]
    filled = [weight for weight in weights if weight.numel()]
    finite = torch.isfinite(torch.stack(torch._foreach_norm(filled))).all()  # type: ignore[arg-type]
    return agree(finite) if is_sharded(module) else bool(finite)
