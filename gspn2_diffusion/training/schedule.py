"""One clock for all ranks: how far the budget is used, what is due, and the learning rate that follows."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from gspn2_diffusion.training.config import RunConfig

ACTIONS = ("validate", "sample", "checkpoint")


def learning_rate_factor(
    progress: float, steps: int, warmup_steps: int, decay_fraction: float, shape: str = "linear"
) -> float:
    """Warm-up, constant, decay to zero (WSD; with "cosine" and a fraction of 1 the usual cosine).

    Args:
        progress: used share of the budget, 0 to 1.
        steps: optimiser steps since the optimiser started.
        warmup_steps: length of the linear warm-up.
        decay_fraction: last share of the budget over which the factor falls to 0.
        shape: "linear", "cosine" or "constant" (no decay).
    """
    warm = min(1.0, (steps + 1) / max(1, warmup_steps))
    if decay_fraction <= 0.0 or shape == "constant":
        return warm
    left = min(1.0, max(0.0, 1.0 - progress) / decay_fraction)
    return warm * (left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


@dataclass(frozen=True)
class Tick:
    """Rank 0's word on one step, the same on every rank; ``terminated`` when SIGTERM ended the run early."""

    progress: float
    minutes: float
    minutes_left: float
    stop: bool
    terminated: bool = False
    due: frozenset[str] = field(default_factory=frozenset)


class Conductor:
    """Asks rank 0 before every step whether to go on, and what is due.

    Clocks of different processes differ, and a rank that decided alone would leave the others waiting in a
    collective. The answer travels over a gloo group, so the GPU queue is never waited for.

    Args:
        config: budgets and intervals.
        started: `time.monotonic()` at the start of the process, so that imports and compiling count too.
    """

    def __init__(self, config: RunConfig, started: float) -> None:
        self._config = config
        self._started = started
        self._terminated = False
        self._last = {name: (0, self._minutes()) for name in ACTIONS}
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._group, self._device = _clock_group() if self._world > 1 else (None, "cpu")
        self._leads = self._world == 1 or dist.get_rank() == 0

    def listen_for_termination(self) -> None:
        """SIGTERM ends the run after the current step, with a checkpoint."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_terminated", True))

    def resume_at(self, step: int) -> None:
        """Count intervals from `step`."""
        self._last = {name: (step, minutes) for name, (_, minutes) in self._last.items()}

    def tick(self, step: int) -> Tick:
        """The same answer on all ranks for the step that is about to start."""
        row = self._decide(step) if self._leads else [0.0] * (5 + len(ACTIONS))
        if self._world > 1:
            message = torch.tensor(row, dtype=torch.float64, device=self._device)
            dist.broadcast(message, src=0, group=self._group)
            row = message.tolist()
        due = frozenset(name for name, flag in zip(ACTIONS, row[5:], strict=True) if flag)
        for name in due:
            self._last[name] = (step, row[1])
        stop, terminated = bool(row[3]), bool(row[4])
        return Tick(row[0], row[1], row[2], stop=stop, terminated=terminated, due=due)

    def _minutes(self) -> float:
        return (time.monotonic() - self._started) / 60

    def _decide(self, step: int) -> list[float]:
        minutes, config = self._minutes(), self._config
        by_steps = step / config.max_train_steps if config.max_train_steps else 0.0
        by_time = minutes / config.max_train_minutes if config.max_train_minutes else 0.0
        left = config.max_train_minutes - minutes if config.max_train_minutes else float("inf")
        used_up = max(by_steps, by_time) >= 1.0
        terminated = self._terminated and not used_up
        due = [float(self._is_due(name, step, minutes)) for name in ACTIONS]
        progress = min(1.0, max(by_steps, by_time))
        return [progress, minutes, left, float(used_up or terminated), float(terminated), *due]

    def _is_due(self, name: str, step: int, minutes: float) -> bool:
        last_step, last_minutes = self._last[name]
        steps = getattr(self._config, f"{name}_steps")
        every = getattr(self._config, f"{name}_minutes")
        by_steps = steps is not None and step - last_step >= steps
        return by_steps or (every is not None and minutes - last_minutes >= every)


def _clock_group() -> tuple[dist.ProcessGroup | None, str]:
    """A gloo group (its messages never wait for the GPU), or the default group where gloo cannot start."""
    if dist.get_backend() == "gloo":
        return None, "cpu"
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if one_host and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve stops gloo
    try:
        return dist.new_group(backend="gloo"), "cpu"
    except RuntimeError:
        return None, f"cuda:{torch.cuda.current_device()}"
