"""The training loop that all scripts share: steps, averaging, guard, log, validation, checkpoints."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from gspn2_diffusion.training import checkpoint as ckpt
from gspn2_diffusion.training.config import RunConfig
from gspn2_diffusion.training.optim import JointOptimizer, build_optimizer, set_learning_rate
from gspn2_diffusion.training.runtime import Run, compile_in_place
from gspn2_diffusion.training.schedule import Conductor, Tick, learning_rate_factor


class TrainingDivergedError(RuntimeError):
    """A gradient was not finite; the last good checkpoint stays."""


class Task(Protocol):
    """What a script adds to the loop."""

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data so far."""

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Scalar loss of one micro-step, on every rank."""

    def validate(self, step: int) -> dict[str, float]:
        """Measures of the averaged weights; rank 0 alone, so no collectives."""

    def sample(self, step: int) -> None:
        """Write a picture sheet; rank 0 alone, so no collectives."""


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        module: the bare model; its parameters are the trained ones.
        model: what is called in training (`module`, or its distributed wrapper).
        warm_from: step at which the optimiser started, from which the warm-up counts.
        pictures: pictures trained on, all ranks together.
    """

    module: Any  # an nn.Module; diffusers' classes lack the types
    model: nn.Module
    optimizer: JointOptimizer
    ema: EMAModel
    architecture: dict[str, Any]
    step: int = 0
    pictures: int = 0
    warm_from: int = 0

    def averages(self) -> dict[str, Tensor]:
        """Averaged parameters by name."""
        names = [name for name, _ in self.module.named_parameters()]
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def copy_average_to(self, other: nn.Module) -> None:
        """Give another model of the same architecture the averaged weights, in its own type."""
        with torch.no_grad():
            for target, source in zip(other.parameters(), self.ema.shadow_params, strict=True):
                target.copy_(source)

    def save(self, folder: Path, keep: int) -> Path:
        """Write ``checkpoint-<step>`` and delete the oldest ones."""
        target = folder / f"checkpoint-{self.step}"
        files = {
            "model.safetensors": dict(self.module.state_dict()),
            "ema.safetensors": self.averages(),
            "optimizer.safetensors": ckpt.optimizer_tensors(self.optimizer.state_dict()),
        }
        ckpt.write_folder(target, files, self._numbers("checkpoint"))
        ckpt.prune(folder, keep)
        return target

    def save_compact(self, folder: Path, contents: str) -> None:
        """Write bf16 weights ("both", "ema" or "raw") in small files, without the optimiser."""
        tensors: dict[str, Tensor] = {}
        if contents in ("both", "ema"):
            tensors |= ckpt.with_prefix("ema", self.averages().items())
        if contents in ("both", "raw"):
            tensors |= ckpt.with_prefix("raw", self.module.state_dict().items())
        ckpt.write_folder(folder, ckpt.compact_files(tensors), self._numbers("compact"))

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint, or from compact weights with a fresh optimiser.

        Raises:
            CheckpointError: it is damaged or of another architecture.
        """
        numbers = ckpt.read_state(folder)
        _compare(self.architecture, numbers.get("architecture"), folder)
        if numbers["kind"] == "compact":
            both = ckpt.read_tensors(folder, "weights-*.safetensors")
            average, raw = ckpt.without_prefix("ema", both), ckpt.without_prefix("raw", both)
            self._load_weights(raw or average, average or raw)
            self.warm_from = numbers["step"]
        else:
            self._load_weights(
                ckpt.read_tensors(folder, "model.safetensors"), ckpt.read_tensors(folder, "ema.safetensors")
            )
            flat = ckpt.read_tensors(folder, "optimizer.safetensors")
            self.optimizer.load_state_dict(ckpt.optimizer_state(flat, self.optimizer.state_dict()))
            self.warm_from = numbers["warm_from"]
        self.step, self.pictures = numbers["step"], numbers["pictures"]
        self.ema.optimization_step = numbers["ema_step"]

    def _load_weights(self, raw: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        missing = self.averages().keys() - raw.keys() | self.averages().keys() - average.keys()
        if missing:
            raise ckpt.CheckpointError(f"weights are missing: {', '.join(sorted(missing)[:5])}")
        self.module.load_state_dict(raw, strict=False)  # averaged weights come without buffers
        for name, target in self.averages().items():
            target.copy_(average[name])

    def _numbers(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "step": self.step,
            "pictures": self.pictures,
            "warm_from": self.warm_from,
            "ema_step": self.ema.optimization_step,
            "architecture": self.architecture,
        }


def _compare(own: dict[str, Any], other: dict[str, Any] | None, folder: Path) -> None:
    other = other or {}
    differing = [k for k in sorted({*own, *other}) if not k.startswith("_") and own.get(k) != other.get(k)]
    if differing:
        raise ckpt.CheckpointError(
            f"{folder} is of another architecture; it differs in: {', '.join(differing)}"
        )


def prepare_state(run: Run, module: Any, architecture: dict[str, Any]) -> TrainState:
    """Model on the device, compiled and distributed; optimiser; averages; resumed where asked for."""
    config = run.config
    module.to(run.device).train()
    optimizer = build_optimizer(
        module,
        config.optimizer,
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=run.compiled_device,
    )
    ema = EMAModel(
        module.parameters(),
        decay=config.ema_decay,
        use_ema_warmup=True,
        power=0.75,
        foreach=run.compiled_device,
    )
    state = TrainState(module, module, optimizer, ema, architecture)
    source = ckpt.find_resume(config.resume_from, run.output)
    if source is not None:
        state.load(source)
        run.say(f"resumed from {source}: step {state.step}, {state.pictures:,} pictures")
    compile_in_place(run, module)
    state.model = run.accelerator.prepare(module) if run.world > 1 else module
    return state


class _Guard:
    """Remembers, on the device, the first step whose gradient was not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, norm: Tensor, step: int) -> None:
        bad = ~torch.isfinite(norm) & (self._first < 0)
        self._first = torch.where(bad, step, self._first)

    def check(self, weights: list[Tensor] | None = None) -> None:
        """Raise after a bad gradient; with `weights`, before they are written, also when they overflowed."""
        first = int(self._first)
        if first >= 0:
            raise TrainingDivergedError(
                f"the gradient of step {first} is not finite; no later checkpoint was written"
            )
        if weights is not None:
            norms = torch.stack(torch._foreach_norm(weights))  # type: ignore[arg-type]
            if not bool(torch.isfinite(norms).all()):
                raise TrainingDivergedError("weights are not finite at this step; they were not written")


class _Meter:
    """Collects on the device between log lines; reading it is the only time the loop waits."""

    def __init__(self, run: Run, config: RunConfig, task: Task) -> None:
        self._run, self._config, self._task = run, config, task
        self._loss = torch.zeros((), device=run.device)
        self._restart()

    def _restart(self) -> None:
        self._since, self._steps, self._waited = time.monotonic(), 0, self._task.wait_seconds
        self._loss.zero_()

    def pause(self) -> None:
        """Leave out what happened since the last line (validation, saving)."""
        self._restart()

    def add(self, loss: Tensor) -> None:
        self._loss += loss
        self._steps += 1

    def line(self, state: TrainState, tick: Tick, rate: float, per_step: int) -> None:
        loss = float(self._run.accelerator.reduce(self._loss.clone(), reduction="mean")) / max(1, self._steps)
        seconds = max(1e-9, time.monotonic() - self._since)
        wait = (self._task.wait_seconds - self._waited) / seconds
        speed = self._steps * per_step / seconds
        memory = (
            torch.cuda.max_memory_allocated(self._run.device) / 2**30 if self._run.compiled_device else 0.0
        )
        self._run.say(
            f"step {state.step} pictures {state.pictures:,} loss {loss:.4f} lr {rate:.2e} "
            f"{speed:,.0f} pictures/s data wait {wait:.1%} memory {memory:.1f} GiB "
            f"left {tick.minutes_left:.1f} min"
        )
        self._run.record(
            step=state.step,
            pictures=state.pictures,
            loss=loss,
            lr=rate,
            speed=speed,
            wait=wait,
            minutes=tick.minutes,
        )
        self._restart()


def fit(run: Run, state: TrainState, task: Task) -> None:
    """Train until the budget is used or SIGTERM comes; leave a checkpoint behind.

    Raises:
        TrainingDivergedError: a gradient was not finite.
    """
    config = run.config
    conductor = Conductor(config, run.started)
    conductor.listen_for_termination()
    conductor.resume_at(state.step)
    guard, meter = _Guard(run.device), _Meter(run, config, task)
    per_step = config.batch_size * config.gradient_accumulation_steps * run.world
    _validate(run, state, task)
    meter.pause()
    first, tick = state.step, conductor.tick(state.step)
    while not tick.stop:
        factor = learning_rate_factor(
            tick.progress, state.step - state.warm_from, config.warmup_steps, config.lr_decay_fraction
        )
        rate = config.learning_rate * factor
        set_learning_rate(state.optimizer, rate)
        meter.add(_optimise(run, state, task, guard))
        state.step += 1
        state.pictures += per_step
        tick = conductor.tick(state.step)
        if state.step % config.log_steps == 0 or state.step - first in (1, 2, 5) or tick.stop:
            guard.check()
            meter.line(state, tick, rate, per_step)
        if tick.due and not tick.stop:
            guard.check([param.detach() for param in state.module.parameters()])
            _act(run, state, task, tick)
            meter.pause()
    guard.check([param.detach() for param in state.module.parameters()])
    _finish(run, state, task, first)


def _optimise(run: Run, state: TrainState, task: Task, guard: _Guard) -> Tensor:
    """One optimiser step; returns its loss, still on the device."""
    config = run.config
    total = torch.zeros((), device=run.device)
    for micro in range(config.gradient_accumulation_steps):
        last = micro == config.gradient_accumulation_steps - 1
        quiet = contextlib.nullcontext() if last else run.accelerator.no_sync(state.model)
        with quiet:
            with run.autocast():
                loss = task.loss(state.model, state.step, micro) / config.gradient_accumulation_steps
            loss.backward()
        total += loss.detach()
    params = list(state.module.parameters())
    norm = nn.utils.clip_grad_norm_(params, config.max_grad_norm or float("inf"))
    guard.watch(norm, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.step(params)
    return total


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


def _act(run: Run, state: TrainState, task: Task, tick: Tick) -> None:
    if "checkpoint" in tick.due and run.is_main:
        try:
            run.say(f"wrote {state.save(run.output, run.config.keep_checkpoints)}")
        except OSError as error:  # a full disk: earlier checkpoints are whole, training goes on
            run.say(f"step {state.step}: checkpoint failed: {error}")
    if "validate" in tick.due:
        _validate(run, state, task)
    if "sample" in tick.due:
        _sample(run, state, task)


def _finish(run: Run, state: TrainState, task: Task, first: int) -> None:
    config = run.config
    if run.is_main and state.step > first:
        if config.save_compact is not None:
            state.save_compact(Path(config.save_compact), config.compact_contents)
        if config.final_checkpoint:
            run.say(f"wrote {state.save(run.output, config.keep_checkpoints)}")
        _validate(run, state, task)
