"""Settings of ``scripts/distill_steps.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn2_diffusion.training.config import ConfigError, DenoiserConfig, option


@dataclass
class FewStepConfig(DenoiserConfig):
    """A denoiser taught to draw in a few steps, without guidance, what it draws in many with guidance."""

    teacher: str | None = option(None, "denoiser folder; unset: transformer/ of `pretrained`")
    transformer_config: str | None = option(None, "not used: the student is built like the teacher")
    learning_rate: float = option(3e-4, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled, on matrices only")
    ema_decay: float = option(0.995, "of the averaged weights")
    caption_dropout: float = option(0.02, "share of captions replaced by the empty one")
    student_steps: int = option(4, "steps that the student draws in")
    teacher_steps: int = option(20, "steps of the teacher, a multiple of `student_steps`")
    teacher_guidance: float = option(4.0, "guidance of the teacher, which the student learns with")
    between_share: float = option(0.25, "share of training points between the ends of a step")
    pair_bank: int = option(8192, "steps of the teacher kept on each GPU for replay")
    lora_rank: int = option(0, "rank of an adapter that is trained instead of the weights; 0: all weights")
    lora_alpha: int | None = option(None, "scale of the adapter times its rank; unset: the rank")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        super().validate()
        if self.student_steps < 1 or self.pair_bank < 1:
            raise ConfigError("`student_steps` and `pair_bank` must be at least 1")
        if self.teacher_steps < self.student_steps or self.teacher_steps % self.student_steps:
            raise ConfigError(
                f"`teacher_steps` is {self.teacher_steps}; allowed: multiples of `student_steps`, "
                f"{self.student_steps}"
            )
        self._check_adapter()
        if not 0.0 <= self.between_share <= 1.0:
            raise ConfigError(f"`between_share` is {self.between_share}; allowed: 0 to 1")
        if self.prediction != "flow":
            raise ConfigError(f"`prediction` is {self.prediction!r}; a few-step model is made by flow alone")
        for name in ("aspects", "init_from", "mixer", "transformer_config"):
            if getattr(self, name):
                raise ConfigError(
                    f"`{name}` is set; the student has the teacher's shape and one picture size"
                )
        if self.refresh is not None and self.refresh > self.batch_size:
            raise ConfigError(
                f"`refresh` is {self.refresh}; allowed: at most `batch_size`, {self.batch_size}"
            )

    def _check_adapter(self) -> None:
        if self.lora_rank < 0:
            raise ConfigError(f"`lora_rank` is {self.lora_rank}; allowed: 0 (all weights) or more")
        if self.lora_alpha is not None and (self.lora_rank == 0 or self.lora_alpha < 1):
            raise ConfigError(f"`lora_alpha` is {self.lora_alpha}; it is for a `lora_rank`, and at least 1")
        if self.lora_rank and self.optimizer == "muon":
            raise ConfigError(
                "`optimizer` is 'muon', which is for whole matrices; allowed with `lora_rank`: "
                "adamw, adamw8bit"
            )
        if self.lora_rank and self.keep_best is not None:
            raise ConfigError(f"`keep_best` is {self.keep_best!r}; with `lora_rank` only the end is written")

    @property
    def paths(self) -> int:
        """Pictures that the teacher draws in each micro-step; every one gives `student_steps` pairs."""
        return self.refresh or max(1, self.batch_size // 4)

    def teacher_folder(self) -> Path:
        """Folder of the teacher's denoiser."""
        folder = Path(self.teacher) if self.teacher else self.component_of_pretrained("transformer")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"`teacher`: there is no model in {folder}")
        return folder

    def component_of_pretrained(self, name: str) -> Path:
        """A folder of `pretrained`."""
        if self.pretrained is None:
            raise ConfigError("`teacher` is not given, nor `pretrained`")
        return self.component(name)
