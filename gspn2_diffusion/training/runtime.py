"""What a run is made of: processes, devices, folders, the log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.training.config import ConfigError, RunConfig, save_config
from gspn2_diffusion.training.zero import check_installed, wanted_stage


@dataclass
class Run:
    """One process of a training run."""

    accelerator: Accelerator
    config: RunConfig
    output: Path
    started: float

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def half(self) -> torch.dtype:
        """Type of frozen models and of what is sampled: bfloat16 on CUDA, else float32."""
        return (
            torch.bfloat16
            if self.compiled_device and self.config.mixed_precision == "bf16"
            else torch.float32
        )

    @property
    def fsdp(self) -> bool:
        """Whether accelerate was launched with FSDP2, which splits weights over the processes.

        On CPUs accelerate does not look at its own settings, so they are read here.
        """
        if getattr(self.accelerator, "is_fsdp2", False):
            return True
        wanted = flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "2"
        return wanted and self.device.type == "cpu" and self.world > 1

    @property
    def splits(self) -> bool:
        """Whether something of what is trained is split over the processes: FSDP2 or DeepSpeed."""
        return self.fsdp or wanted_stage(self.accelerator) is not None

    def mesh(self) -> Any:
        """All processes in one line, for FSDP2."""
        return init_device_mesh(self.device.type, (self.world,))

    def fsdp_options(self) -> tuple[bool, bool]:
        """``reshard_after_forward`` and whether shards lie in host memory, as accelerate was told."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return flag("FSDP_RESHARD_AFTER_FORWARD"), flag("FSDP_OFFLOAD_PARAMS")
        offload = plugin.cpu_offload
        offloads = offload if isinstance(offload, bool) else type(offload).__name__ == "CPUOffloadPolicy"
        return bool(plugin.reshard_after_forward), offloads

    @property
    def compiled_device(self) -> bool:
        """Whether the device is one that compiling and half precision are meant for."""
        return self.device.type == "cuda"

    @property
    def compiles(self) -> bool:
        """Whether models are compiled."""
        return self.config.compile and self.compiled_device

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast, where asked for."""
        enabled = self.config.mixed_precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def say(self, text: str) -> None:
        """One line from the main process."""
        if self.is_main:
            print(f"[{(time.monotonic() - self.started) / 60:6.2f} min] {text}", flush=True)

    def record(self, **values: Any) -> None:
        """One line into ``metrics.jsonl``."""
        if self.is_main:
            with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
            if "step" in values and self.accelerator.trackers:
                self.accelerator.log(numbers, step=values["step"])

    def generator(self, stream: int, step: int) -> torch.Generator:
        """Random numbers that follow from (seed, rank, stream, step), so resuming needs no saved state."""
        mixed = hash((self.config.seed, self.rank, stream, step)) & 0x7FFF_FFFF_FFFF_FFFF
        return torch.Generator(self.device).manual_seed(mixed)


def flag(name: str) -> bool:
    """Whether an environment variable of accelerate's is set to yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def start_run(config: RunConfig, started: float) -> Run:
    """Join the processes, make the folder, save the settings.

    Args:
        config: checked settings.
        started: `time.monotonic()` at the start of the process.
    """
    if torch.cuda.is_available():  # it also holds for CPUs, some of which would then round float32, too
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    # One bucket-wise split of the graph would cost more than the overlap it buys at this model size.
    torch._dynamo.config.optimize_ddp = False
    handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True, static_graph=config.static_graph)
    trackers, missing = available_trackers(config.trackers)
    check_launch()
    accelerator = Accelerator(
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[handler],
        log_with=list(trackers) or None,
        project_dir=config.output_dir,
    )
    run = Run(accelerator, config, Path(config.output_dir), started)
    if run.fsdp:  # transformers would leave the frozen models empty on all processes but the first
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if run.is_main:
        save_config(config, run.output)
        run.record(**describe_environment(), processes=run.world)
    if trackers:
        accelerator.init_trackers("logs", config=_flat(config))
    if missing:
        run.say(f"not installed, so not used: {', '.join(missing)}; metrics.jsonl has every number")
    accelerator.wait_for_everyone()
    torch.manual_seed(config.seed)  # the same weights on all ranks; everything else has its own generator
    run.say(f"{run.world} process(es) on {_device_name(run.device)}")
    return run


def check_launch() -> None:
    """Raise ConfigError for ways of splitting a model that are not known here, or not installed."""
    instead = "launch with configs/accelerate/fsdp2.yaml, or one beside it"
    if flag("ACCELERATE_USE_DEEPSPEED"):
        check_installed()
    if flag("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(f"FSDP of version 1 is not supported (`fsdp_version: 2` is): {instead}")
    for name in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if flag(name):
            raise ConfigError(f"{name} is set, but only DDP, FSDP2 and DeepSpeed are supported: {instead}")


def available_trackers(wanted: str) -> tuple[list[str], list[str]]:
    """Names of accelerate's trackers in a comma-separated list: installed ones and missing ones.

    Raises:
        ConfigError: accelerate has no such tracker.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip() not in ("", "none")]
    known = [str(kind.value) for kind in LoggerType if kind != LoggerType.ALL]
    for name in names:
        if name not in known:
            raise ConfigError(f"`trackers` names {name!r}; allowed: none, {', '.join(sorted(known))}")
    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    return [n for n in names if n in installed], [n for n in names if n not in installed]


def _flat(config: RunConfig) -> dict[str, Any]:
    """Settings as trackers take them."""
    kept = dataclasses.asdict(config).items()
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in kept}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compile_in_place(run: Run, model: nn.Module) -> None:
    """Compile the model or its repeated blocks; class, state and ``forward`` stay as they are."""
    if not run.compiles:
        return
    options: dict[str, Any] = {"dynamic": False, "fullgraph": run.config.compile_fullgraph}
    if run.config.compile_mode is not None:
        options["mode"] = run.config.compile_mode
    if run.config.compile_scope == "blocks" and getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(**options)  # type: ignore[operator]
    else:
        model.compile(**options)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(param.numel() for param in model.parameters())


def end_run(run: Run) -> None:
    """Leave the process group; without it, NCCL complains at exit."""
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
