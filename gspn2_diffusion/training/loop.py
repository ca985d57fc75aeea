"""The training loop that all scripts share: steps, averaging, guard, log, validation, checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.guard import Guard, TrainingDivergedError, weights_are_finite
from gspn2_diffusion.training.optim import set_learning_rate
from gspn2_diffusion.training.progress import Meter
from gspn2_diffusion.training.runtime import Run
from gspn2_diffusion.training.schedule import Conductor, Tick, learning_rate_factor
from gspn2_diffusion.training.state import TrainState, prepare_state

__all__ = ["Task", "TrainState", "TrainingDivergedError", "fit", "optimise", "prepare_state"]


class Task(Protocol):
    """What a script adds to the loop. ``describe_batch(step) -> str``, if there is one, names a bad batch."""

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Scalar loss of one micro-step, on every rank."""

    def validate(self, step: int) -> dict[str, float]:
        """Measures of the averaged weights; rank 0 alone, so no collectives."""

    def sample(self, step: int) -> None:
        """Write a picture sheet; rank 0 alone, so no collectives."""


def fit(run: Run, state: TrainState, task: Task) -> None:
    """Train until the budget is used or SIGTERM comes; leave a checkpoint behind.

    After SIGTERM ``state.terminated`` is set: the checkpoint is written and nothing else.

    Raises:
        TrainingDivergedError: a gradient or a weight was not finite.
    """
    conductor = Conductor(run.config, run.started)
    conductor.listen_for_termination()
    conductor.resume_at(state.step)
    config, guard = run.config, Guard(run.device)
    per_step = config.batch_size * config.gradient_accumulation_steps * run.world
    _begin(run, state, task)
    meter = Meter(run, task, per_step)
    first, tick = state.step, conductor.tick(state.step)
    while not tick.stop:
        factor = learning_rate_factor(
            tick.progress,
            state.step - state.warm_from,
            config.warmup_steps,
            config.lr_decay_fraction,
            config.lr_schedule,
        )
        rate = config.learning_rate * factor
        set_learning_rate(state.optimizer, rate)
        meter.add(optimise(run, state, task, guard), state.step + 1)
        state.step += 1
        state.pictures += per_step
        tick = conductor.tick(state.step)
        if state.step % config.log_steps == 0 or state.step - first in (1, 2, 5) or tick.stop:
            _check_gradients(guard, task)
            meter.line(state, tick, rate)
        if tick.due and not tick.stop:
            _check_all(guard, state, task)
            _act(run, state, task, tick)
            meter.pause()
    meter.close()
    _check_all(guard, state, task)
    state.terminated = tick.terminated
    _finish(run, state, task, first)


def _check_gradients(guard: Guard, task: Task) -> None:
    step = guard.first_bad_step()
    if step is None:
        return
    raise TrainingDivergedError(
        f"the gradient of step {step} is not finite{_batch(task, step)}; no later checkpoint was written"
    )


def _batch(task: Task, step: int) -> str:
    describe = getattr(task, "describe_batch", None)
    return f" (batch: {describe(step)})" if describe else ""


def _check_all(guard: Guard, state: TrainState, task: Task) -> None:
    """Before weights are written: they may overflow although every gradient was finite."""
    _check_gradients(guard, task)
    if not weights_are_finite(state.module):
        raise TrainingDivergedError(
            f"weights are not finite after step {state.step - 1}{_batch(task, state.step - 1)}; "
            "they were not written"
        )


def optimise(run: Run, state: TrainState, task: Task, guard: Guard) -> Tensor:
    """One optimiser step; returns its loss, still on the device."""
    config = run.config
    total = torch.zeros((), device=run.device)
    for micro in range(config.gradient_accumulation_steps):
        last = micro == config.gradient_accumulation_steps - 1
        with _syncing(run, state, last):
            with run.autocast():
                loss = task.loss(state.model, state.step, micro) / config.gradient_accumulation_steps
            _backward(state, loss, last)
        total += loss.detach()
    params = list(state.trained().values())
    guard.watch(_update(run, state, params), state.step)
    state.ema.step(params)
    return total


def _backward(state: TrainState, loss: Tensor, last: bool) -> None:
    if state.zero is not None:
        state.zero.backward(loss, last)
    else:
        loss.backward()


def _update(run: Run, state: TrainState, params: list[nn.Parameter]) -> Tensor:
    """Clip and step; the norm of the gradients."""
    if state.zero is not None:
        return state.zero.step(run.device)
    norm = nn.utils.clip_grad_norm_(params, run.config.max_grad_norm or float("inf"))
    state.optimizer.step()
    state.optimizer.zero_grad()
    return norm


def _syncing(run: Run, state: TrainState, last: bool) -> contextlib.AbstractContextManager[object]:
    """Gradients meet over the processes in the last micro-step only."""
    if state.sharded:
        state.module.set_requires_gradient_sync(last)
    if state.sharded or state.zero is not None:
        return contextlib.nullcontext()
    return contextlib.nullcontext() if last else run.accelerator.no_sync(state.model)


def _begin(run: Run, state: TrainState, task: Task) -> None:
    """Measures, and a picture sheet of the very first weights where sheets are wanted at all."""
    config = run.config
    state.gather_averages(run.is_main)
    _validate(run, state, task)
    wanted = config.sample_steps is not None or config.sample_minutes is not None
    if wanted and config.sample_at_start and state.step == 0:
        _sample(run, state, task)


def _validate(run: Run, state: TrainState, task: Task) -> None:
    if run.is_main:
        measures = task.validate(state.step)
        if measures:
            run.say(f"step {state.step} " + " ".join(f"{k} {v:.4f}" for k, v in measures.items()))
            run.record(step=state.step, pictures=state.pictures, **measures)


def _sample(run: Run, state: TrainState, task: Task) -> None:
    if not run.is_main:
        return
    try:
        task.sample(state.step)
    except Exception as error:  # a sheet that fails must not cost the run
        run.say(f"step {state.step}: no picture sheet: {type(error).__name__}: {error}")


def _save(run: Run, state: TrainState) -> None:
    if run.is_main or state.sharded or state.zero is not None:
        target = state.save(run.output, run.config.keep_checkpoints, write=run.is_main)
        run.say(f"wrote {target}")


def _act(run: Run, state: TrainState, task: Task, tick: Tick) -> None:
    if "checkpoint" in tick.due:
        try:
            _save(run, state)
        except OSError as error:  # a full disk: earlier checkpoints are whole, training goes on
            run.say(f"step {state.step}: checkpoint failed: {error}")
    if {"validate", "sample"} & tick.due:
        state.gather_averages(run.is_main)
    if "validate" in tick.due:
        _validate(run, state, task)
    if "sample" in tick.due:
        _sample(run, state, task)


def _finish(run: Run, state: TrainState, task: Task, first: int) -> None:
    config = run.config
    if state.step > first:
        if config.save_compact is not None and (run.is_main or state.sharded):
            state.save_compact(Path(config.save_compact), config.compact_contents, write=run.is_main)
        if config.final_checkpoint or state.terminated:
            _save(run, state)
    state.gather_averages(run.is_main)
    if state.terminated:
        run.say(f"stopped by SIGTERM at step {state.step}; continue with --resume_from latest")
    elif state.step > first:
        _validate(run, state, task)
