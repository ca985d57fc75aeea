"""What a run tells while it trains: log lines, trackers, a bar on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

import torch
from torch import Tensor

from gspn2_diffusion.training.runtime import Run
from gspn2_diffusion.training.schedule import Tick
from gspn2_diffusion.training.state import TrainState


class Waiting(Protocol):
    """Knows how long the run waited for data."""

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""


class Meter:
    """Collects on the device between log lines; reading it is the only time the loop waits.

    Args:
        run: the run.
        task: tells the time spent waiting for data.
        per_step: pictures in an optimiser step, all ranks together.
    """

    def __init__(self, run: Run, task: Waiting, per_step: int) -> None:
        self._run, self._task, self._per_step = run, task, per_step
        self._loss = torch.zeros((), device=run.device)
        self._bar = _bar(run)
        self._restart()

    def _restart(self) -> None:
        self._since, self._steps, self._waited = time.monotonic(), 0, self._task.wait_seconds
        self._loss.zero_()

    def pause(self) -> None:
        """Leave out what happened since the last line (validation, saving)."""
        self._restart()

    def add(self, loss: Tensor, step: int) -> None:
        """Count one optimiser step, which ended at `step`."""
        self._loss += loss
        self._steps += 1
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def line(self, state: TrainState, tick: Tick, rate: float) -> None:
        """Say and record the mean loss, speed, data-wait share and memory since the last line."""
        loss = float(self._run.accelerator.reduce(self._loss.clone(), reduction="mean")) / max(1, self._steps)
        seconds = max(1e-9, time.monotonic() - self._since)
        values = {
            "step": state.step,
            "pictures": state.pictures,
            "loss": loss,
            "lr": rate,
            "speed": self._steps * self._per_step / seconds,
            "wait": (self._task.wait_seconds - self._waited) / seconds,
            "memory": self._memory(),
            "minutes": tick.minutes,
        }
        self._say(values, tick)
        self._run.record(**values)
        self._restart()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _memory(self) -> float:
        """Most GiB in use on the GPU so far; 0 on a CPU."""
        if not self._run.compiled_device:
            return 0.0
        return torch.cuda.max_memory_allocated(self._run.device) / 2**30

    def _say(self, values: dict[str, Any], tick: Tick) -> None:
        speed = f"{values['speed']:,.0f} pictures/s data wait {values['wait']:.1%}"
        memory = f"memory {values['memory']:.1f} GiB"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f} {speed} {memory}")
            return
        self._run.say(
            f"step {values['step']} pictures {values['pictures']:,} loss {values['loss']:.4f} "
            f"lr {values['lr']:.2e} {speed} {memory} left {tick.minutes_left:.1f} min"
        )


def _bar(run: Run) -> Any:
    """A bar on the main process's terminal; lines are better in a file."""
    wanted = run.config.progress_bar
    if wanted == "no" or not run.is_main or (wanted == "auto" and not sys.stderr.isatty()):
        return None
    from tqdm import tqdm

    return tqdm(total=run.config.max_train_steps, unit="step", dynamic_ncols=True, smoothing=0.1)
