"""Settings of ``scripts/train_lora.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gspn2_diffusion.training.config import ConfigError, DenoiserConfig, option


@dataclass
class LoraTrainConfig(DenoiserConfig):
    """LoRA, DoRA and DreamBooth on a trained pipeline."""

    pretrained: str | None = option("gspn2-emoji", "pipeline folder or embedded model that is tuned")
    learning_rate: float = option(2e-4, "peak learning rate")
    batch_size: int = option(4, "pictures per optimiser micro-step and process")
    weight_decay: float = option(1e-4, "decoupled, on matrices only")
    ema_decay: float = option(0.99, "of the averaged adapter")
    compile: bool = option(False, "torch.compile on CUDA")
    sheet_prompts: str | None = option(None, "prompts of the picture sheets; unset: captions of the data")
    save_pipeline: bool = option(False, "write a pipeline folder with the adapter fused in, too")
    rank: int = option(16, "rank of the adapter")
    alpha: int | None = option(None, "scale of the adapter times its rank; unset: the rank")
    lora_dropout: float = option(0.0, "dropout before the adapter")
    dora: bool = option(False, "DoRA: learn magnitudes apart from directions")
    target_modules: list[str] | None = option(  # noqa: RUF009
        None, "patterns of linear layers, such as *.mixer.*; unset: all in the blocks"
    )
    class_data: str | None = option(None, "DreamBooth: folder of pictures of the class, drawn if too few")
    class_prompt: str | None = option(None, "DreamBooth: caption of the class, such as 'a dog'")
    class_pictures: int = option(64, "DreamBooth: pictures of the class that are wanted")
    prior_weight: float = option(1.0, "DreamBooth: weight of the class in the loss")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        super().validate()
        if self.rank < 1:
            raise ConfigError(f"`rank` is {self.rank}; at least 1 is needed")
        if self.alpha is not None and self.alpha < 1:
            raise ConfigError(f"`alpha` is {self.alpha}; at least 1 is needed, or leave it out")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"`lora_dropout` is {self.lora_dropout}; allowed: 0 to below 1")
        if (self.class_data is None) != (self.class_prompt is None):
            raise ConfigError("`class_data` and `class_prompt` belong together; give both or none")
        if self.class_pictures < 1:
            raise ConfigError(f"`class_pictures` is {self.class_pictures}; at least 1 is needed")

    def base(self) -> Path:
        """Folder of the denoiser that is tuned."""
        folder = Path(self.init_from) if self.init_from else self.component("transformer")
        if not folder.is_dir():
            raise ConfigError(f"`init_from`: there is no folder {folder}")
        return folder
