"""Training of LoRA and DoRA adapters on a frozen denoiser, with DreamBooth's prior preservation."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.checkpoint import replace_folder
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.denoiser import (
    DenoiserTask,
    Encoder,
    fit_and_write,
    load_encoder,
    plain_config,
)
from gspn2_diffusion.training.frozen import FrozenModels
from gspn2_diffusion.training.loop import TrainState, prepare_state
from gspn2_diffusion.training.lora_config import LoraTrainConfig
from gspn2_diffusion.training.model_card import card_text
from gspn2_diffusion.training.runtime import Run
from gspn2_diffusion.training.sources import PictureSource

_CLASS_STREAM, _CLASS_SEED = 31, 32


def target_names(model: nn.Module, patterns: list[str] | None) -> list[str]:
    """Names of the linear layers that get an adapter.

    Args:
        model: a denoiser.
        patterns: with ``*`` and ``?``, against whole module names; None for all inside the blocks.

    Raises:
        ConfigError: a pattern that no linear layer matches.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if patterns is None:
        return [name for name in linear if "blocks." in name]
    for pattern in patterns:
        if not fnmatch.filter(linear, pattern):
            raise ConfigError(f"`target_modules`: {pattern!r} fits no linear layer, such as {linear[5]}")
    return [name for name in linear if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def load_adapted(config: LoraTrainConfig, dtype: torch.dtype) -> Any:
    """The frozen denoiser with a fresh adapter in float32, which draws as the denoiser alone does.

    Raises:
        ConfigError: peft is not installed, or a pattern fits nothing.
    """
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    model: Any = GSPN2Transformer2DModel.from_pretrained(config.base(), dtype=dtype, use_safetensors=True)
    return add_adapter(
        model,
        target_names(model, config.target_modules),
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        lora_dropout=config.lora_dropout,
        use_dora=config.dora,
    )


def add_adapter(model: Any, targets: list[str], **settings: Any) -> Any:
    """Freeze a denoiser and give it a fresh adapter in float32; returns the model.

    Args:
        model: a denoiser.
        targets: names of the linear layers, such as `target_names` finds.
        settings: of peft's ``LoraConfig``.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("training an adapter needs the package peft: pip install 'peft>=0.17'") from error
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(init_lora_weights=True, target_modules=targets, **settings))
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.float()
    return model


class LoraTask(DenoiserTask):
    """Denoiser training in which only the adapter learns.

    Args:
        run, config, encoder, state: as in `DenoiserTask`.
    """

    config: LoraTrainConfig

    def __init__(self, run: Run, config: LoraTrainConfig, encoder: Encoder, state: TrainState) -> None:
        super().__init__(run, config, encoder, state)
        self._class: PictureSource | None = None
        if config.class_data is not None:
            self._class = self._open_class(Path(config.class_data))

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data."""
        return super().wait_seconds + (self._class.wait_seconds if self._class else 0.0)

    def close(self) -> None:
        """End the threads of the sources."""
        super().close()
        if self._class is not None:
            self._class.close()

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Loss on the pictures, and on those of the class so that it is not forgotten (arXiv 2208.12242)."""
        own = super().loss(model, step, micro)
        if self._class is None:
            return own
        number = step * self.config.gradient_accumulation_steps + micro
        generator = self.run.generator(_CLASS_STREAM, number)
        instance, self.source = self.source, self._class
        try:
            batch, noise, levels = self.draw(micro, generator)
        finally:
            self.source = instance
        question = self.objective.question(batch.latents, noise, levels)
        prior = question.errors(question.ask(model, self.conditions(batch))).mean()
        return own + self.config.prior_weight * prior

    def _make_judge(self) -> Any:
        return load_adapted(self.config, self.run.half)

    def _open_class(self, folder: Path) -> PictureSource:
        encoder, config, state = self.encoder, self.config, self.state
        if not isinstance(encoder, FrozenModels):
            raise ConfigError("`class_data` goes with a `data` folder of pictures, not with emoji scenes")
        state.gather_averages(self.run.is_main)
        if self.run.is_main:
            self._draw_class(folder)
        self.run.accelerator.wait_for_everyone()
        changed = dataclasses.replace(
            config, data=str(folder), data_format="folder", caption=config.class_prompt, caption_column=None
        )
        multiple = encoder.vae_scale * int(state.module.config.patch_size)
        return PictureSource(
            self.run,
            changed,
            encoder,
            multiple=multiple,
            pictures=state.pictures,
            step=state.step,
            held_out=False,
        )

    def _draw_class(self, folder: Path) -> None:
        """Fill the folder with pictures of the class by the model as it is before tuning."""
        folder.mkdir(parents=True, exist_ok=True)
        present = [path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".webp")]
        if len(present) >= self.config.class_pictures:
            return
        self.run.say(f"drawing {self.config.class_pictures - len(present)} pictures of the class")
        pipeline = self.build_pipeline()
        pipeline.transformer.disable_adapters()
        try:
            for number in range(len(present), self.config.class_pictures):
                self._draw_one(pipeline, folder, number)
        finally:
            pipeline.transformer.enable_adapters()

    def _draw_one(self, pipeline: Any, folder: Path, number: int) -> None:
        from gspn2_diffusion.training.sheets import save_picture

        generator = torch.Generator("cpu").manual_seed(_CLASS_SEED * 10**6 + number)
        picture = pipeline(
            self.config.class_prompt,
            height=self.config.resolution,
            width=self.config.resolution,
            num_inference_steps=self.config.sheet_steps,
            guidance_scale=self.config.guidance_scale,
            generator=generator,
        ).images[0]
        save_picture(picture, folder / f"class-{number:05d}.png")


def train_lora(run: Run, config: LoraTrainConfig) -> Path:
    """Train an adapter, then write ``lora/`` (averaged, for ``load_lora_weights``).

    Returns:
        The adapter's folder.
    """
    encoder = load_encoder(run, config)
    module = load_adapted(config, run.half)
    trained = sum(param.numel() for param in module.parameters() if param.requires_grad)
    run.say(
        f"adapter {trained:,} parameters on a denoiser of {sum(p.numel() for p in module.parameters()):,}"
    )
    if config.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    adapter = {name: getattr(config, name) for name in ("rank", "alpha", "dora", "target_modules")}
    state = prepare_state(run, module, plain_config(module) | adapter)
    task = LoraTask(run, config, encoder, state)
    fit_and_write(task, run, state, _finish)
    return run.output / "lora"


def write_adapter(task: DenoiserTask, run: Run, state: TrainState, dtype: torch.dtype | None = None) -> None:
    """``lora/``: the averaged adapter for ``load_lora_weights``, with a card.

    Args:
        task, run, state: as in `DenoiserTask`; the task's pipeline has the adapter.
        dtype: what is stored; None for what the pipeline has.
    """
    from peft.utils import get_peft_model_state_dict

    pipeline, target = task.build_pipeline(), run.output / "lora"
    layers = get_peft_model_state_dict(pipeline.transformer, adapter_name="default")
    part = target.with_name(".lora.part")
    part.mkdir(exist_ok=True)
    pipeline.save_lora_weights(
        part, {name: value.to(dtype or value.dtype) for name, value in layers.items()}, adapter_name="default"
    )
    (part / "README.md").write_text(card_text(task.config, state, run, adapter=True), encoding="utf-8")
    replace_folder(part, target)
    run.say(f"wrote {target}")


def _finish(task: LoraTask, run: Run, state: TrainState) -> None:
    write_adapter(task, run, state)
    task.final_sheet(state.step)
    if task.config.save_pipeline:
        pipeline = task.build_pipeline()
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        task.write_pipeline(pipeline)
