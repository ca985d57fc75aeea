"""Settings of ``scripts/distill.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn2_diffusion.training.config import ConfigError, DenoiserConfig, option


@dataclass
class DistillConfig(DenoiserConfig):
    """An attention denoiser moved over to line scans."""

    teacher: str | None = option(None, "denoiser folder; unset: transformer/ or unet/ of `pretrained`")
    learning_rate: float = option(3e-4, "peak learning rate of stage 2")
    weight_decay: float = option(0.0, "decoupled, on matrices only")
    ema_decay: float = option(0.998, "of the averaged weights")
    compile: bool = option(False, "torch.compile on CUDA; the taps break the graph into pieces")
    keep_attention: list[str] | None = option(  # noqa: RUF009
        None, "hybrid: a number of layers, spread evenly, or names, numbers or patterns of layers"
    )
    init: str = option("attention", "start of the mixers: attention (near it) or random")
    proxy_ratio: int = option(8, "the scan runs in the width over this many channels")
    num_weight_groups: int = option(1, "weight sets of a scan direction")
    chunk_size: int | None = option(None, "lines after which a scan restarts")
    stage1_steps: int | None = option(None, "steps of stage 1; 0 leaves it out")
    stage1_minutes: float | None = option(None, "minutes of stage 1")
    stage1_learning_rate: float = option(1e-3, "peak learning rate of stage 1")
    task_weight: float = option(1.0, "stage 2: of the error against the data")
    output_weight: float = option(1.0, "stage 2: of the error against the teacher's output")
    mixer_tap_weight: float = option(0.1, "stage 2: of the error after each mixer")
    block_tap_weight: float = option(0.1, "stage 2: of the error after each block")
    adapter_rank: int = option(32, "stage 2: width of the adapters at the taps, which are dropped afterwards")
    train_all: bool = option(True, "stage 2 trains the whole student, otherwise its mixers alone")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        super().validate()
        if self.init not in ("attention", "random"):
            raise ConfigError(f"`init` is {self.init!r}; allowed: attention, random")
        if self.stage1_steps is None and self.stage1_minutes is None:
            raise ConfigError("give `stage1_steps` or `stage1_minutes`, or both; 0 steps leave stage 1 out")
        for name in ("proxy_ratio", "num_weight_groups", "adapter_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; at least 1 is needed")
        for name in ("task_weight", "output_weight", "mixer_tap_weight", "block_tap_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; allowed: 0 or more")
        if self.gradient_checkpointing and (self.mixer_tap_weight or self.block_tap_weight):
            raise ConfigError("`gradient_checkpointing` needs `mixer_tap_weight` and `block_tap_weight` 0")

    def teacher_folder(self) -> Path:
        """Folder of the attention denoiser."""
        if self.teacher is not None:
            folder = Path(self.teacher)
            if not (folder / "config.json").is_file():
                raise ConfigError(f"`teacher`: there is no model in {folder}")
            return folder
        for name in ("transformer", "unet"):
            try:
                return self.component(name)
            except ConfigError:
                continue
        raise ConfigError(f"`teacher`: {self.pretrained} has neither transformer/ nor unet/")
