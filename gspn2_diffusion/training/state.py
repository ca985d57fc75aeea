"""Everything that a checkpoint holds: weights, averages, optimiser, counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from gspn2_diffusion.training import checkpoint as ckpt
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.optim import JointOptimizer, build_optimizer
from gspn2_diffusion.training.runtime import Run, compile_in_place
from gspn2_diffusion.training.sharding import is_sharded, local, shard_model, split_like, whole
from gspn2_diffusion.training.zero import ZeroEngine, wanted_stage


@dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
        module: the bare model; those of its parameters that need gradients are the trained ones.
        model: what is called in training (`module`, or its distributed wrapper).
        warm_from: step at which the optimiser started, from which the warm-up counts.
        pictures: pictures trained on, all ranks together.
        sharded: weights are split over the processes (FSDP2), so all of them must call what gathers.
        terminated: SIGTERM ended the run before its budget was used.
        zero: splits the optimiser's state (DeepSpeed); all processes must call what puts it together.
    """

    module: Any  # an nn.Module; diffusers' classes lack the types
    model: nn.Module
    optimizer: JointOptimizer
    ema: EMAModel
    architecture: dict[str, Any]
    step: int = 0
    pictures: int = 0
    warm_from: int = 0
    sharded: bool = False
    terminated: bool = False
    zero: ZeroEngine | None = None
    _moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _gathered: dict[str, Tensor] | None = field(default=None, repr=False)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the model's order."""
        return {name: param for name, param in self.module.named_parameters() if param.requires_grad}

    def averages(self) -> dict[str, Tensor]:
        """Averaged parameters by name (shards where the weights are split)."""
        return dict(zip(self.trained(), self.ema.shadow_params, strict=True))

    def gather_averages(self, keep: bool) -> None:
        """Put split averages together before rank 0 works with them alone; all ranks must call.

        Args:
            keep: whether this process shall hold them, in host memory.
        """
        if self.sharded:
            found = {name: whole(tensor).cpu() for name, tensor in self.averages().items()}
            self._gathered = found if keep else None

    def whole_averages(self) -> dict[str, Tensor]:
        """Averaged parameters by name, whole; where the weights are split, as last gathered."""
        if not self.sharded:
            return self.averages()
        if self._gathered is None:
            raise RuntimeError("`gather_averages` must run on all ranks before")
        return self._gathered

    def copy_average_to(self, other: nn.Module) -> None:
        """Give another model the averaged weights, in its own type: by name, else in order."""
        averages, targets = self.whole_averages(), dict(other.named_parameters())
        if not averages.keys() <= targets.keys():  # the trained model wraps the other one
            targets = dict(zip(averages, targets.values(), strict=True))
        with torch.no_grad():
            for name, source in averages.items():
                targets[name].copy_(source)

    def save(self, folder: Path, keep: int, write: bool = True) -> Path:
        """Write ``checkpoint-<step>`` and delete the oldest ones.

        Where the weights are split all ranks must call, one of them with `write`.

        Raises:
            OSError: the disk refused; nothing that was there before is lost.
        """
        target = folder / f"checkpoint-{self.step}"
        files = {
            "model.safetensors": {name: whole(value) for name, value in self._weights().items()},
            "ema.safetensors": {name: whole(value) for name, value in self.averages().items()},
            "optimizer.safetensors": self._optimizer_tensors(),
        }
        if write:
            ckpt.write_folder(target, files, self._numbers("checkpoint"))
            ckpt.prune(folder, keep)
        return target

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        if self.zero is not None:
            return self.zero.tensors()
        found = ckpt.optimizer_tensors(self.optimizer.state_dict())
        return {name: whole(value) for name, value in found.items()}

    def save_compact(self, folder: Path, contents: str, write: bool = True) -> None:
        """Write bf16 weights ("both", "ema" or "raw") in small files, without the optimiser."""
        tensors: dict[str, Tensor] = {}
        if contents in ("both", "ema"):
            tensors |= ckpt.with_prefix("ema", self.averages().items())
        if contents in ("both", "raw"):
            tensors |= ckpt.with_prefix("raw", self._weights().items())
        tensors = {name: whole(value) for name, value in tensors.items()}
        if write:
            ckpt.write_folder(folder, ckpt.compact_files(tensors), self._numbers("compact"))

    def load(self, folder: Path, later: bool = False) -> None:
        """Continue from a checkpoint, or from compact weights with a fresh optimiser.

        Args:
            folder: of the checkpoint.
            later: the optimiser's state is for `start_zero`, which splits it.

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
            self._moments = ckpt.read_tensors(folder, "optimizer.safetensors")
            found = ckpt.optimizer_state(self._moments, self.optimizer.state_dict())
            if not later:
                self.optimizer.load_state_dict(self._split_state(found))
                self._moments = {}
            self.warm_from = numbers["warm_from"]
        self.step, self.pictures = numbers["step"], numbers["pictures"]
        self.ema.optimization_step = numbers["ema_step"]

    def start_zero(self, run: Run, stage: int) -> None:
        """Hand the module and its optimiser over to DeepSpeed, with the state that was loaded."""
        (adamw,) = self.optimizer.parts
        self.zero = ZeroEngine(self.module, adamw, self._moments, stage, run.config, run.autocast)
        self.model, self._moments = self.zero.engine, {}
        own = self.zero.held()
        run.say(f"DeepSpeed, ZeRO {stage}: optimiser state of {own:,} weights here")
        run.record(optimizer_state_here=own)

    def _weights(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: all of it, or the trained part where the rest is frozen."""
        trained = self.trained()
        if len(trained) < len(list(self.module.parameters())):
            return dict(trained)
        return dict(self.module.state_dict())

    def _split_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Optimiser state read from a file, laid out as its parameters are."""
        if self.sharded:
            for part, entry in zip(self.optimizer.parts, state["parts"], strict=True):
                params = [param for group in part.param_groups for param in group["params"]]
                for index, values in entry["state"].items():
                    entry["state"][index] = {k: split_like(v, params[index]) for k, v in values.items()}
        return state

    def _load_weights(self, raw: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        missing = self.averages().keys() - raw.keys() | self.averages().keys() - average.keys()
        if missing:
            raise ckpt.CheckpointError(f"weights are missing: {', '.join(sorted(missing)[:5])}")
        own = self.module.state_dict(keep_vars=True)  # averaged weights come without buffers
        with torch.no_grad():
            for name in own.keys() & raw.keys():
                own[name].copy_(split_like(raw[name], own[name].detach()))
            for name, target in self.averages().items():
                target.copy_(split_like(average[name], target))

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
    """Model on the device, split or distributed, compiled; optimiser; averages; resumed where asked for."""
    config = run.config
    module.to(run.device).train()
    stage = wanted_stage(run.accelerator)
    if (run.fsdp or stage) and config.optimizer != "adamw":
        kind = "FSDP2" if run.fsdp else "DeepSpeed"
        raise ConfigError(f"`optimizer` is {config.optimizer!r}; with {kind} only adamw is allowed")
    if run.fsdp:
        shard_model(module, run.mesh(), *run.fsdp_options())
    optimizer = build_optimizer(
        module,
        config.optimizer,
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=run.compiled_device,
    )
    ema = EMAModel(
        [param for param in module.parameters() if param.requires_grad],
        decay=config.ema_decay,
        use_ema_warmup=True,
        power=0.75,
        foreach=run.compiled_device and not run.fsdp,
    )
    state = TrainState(module, module, optimizer, ema, architecture, sharded=is_sharded(module))
    if state.sharded:
        own = sum(local(param).numel() for param in module.parameters())
        run.say(f"weights are split: {own:,} of {sum(p.numel() for p in module.parameters()):,} here")
        run.record(weights_here=own)
    if run.is_main:
        ckpt.tidy(run.output)
    run.accelerator.wait_for_everyone()
    source = ckpt.find_resume(config.resume_from, run.output)
    if source is not None:
        state.load(source, later=stage is not None)
        run.say(f"resumed from {source}: step {state.step}, {state.pictures:,} pictures")
    if not state.sharded:  # sharded blocks have another class, and their hooks would break every graph
        compile_in_place(run, module)
    if stage is not None:
        state.start_zero(run, stage)
    elif run.world > 1 and not state.sharded:
        state.model = run.accelerator.prepare(module)
    return state
