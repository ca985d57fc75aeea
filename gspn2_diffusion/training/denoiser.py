"""Training of the text-to-image denoiser by flow matching on composed scenes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from gspn2_diffusion.training.assembly import write_pipeline
from gspn2_diffusion.training.captions import SceneOptions, SceneWriter
from gspn2_diffusion.training.config import DenoiserConfig, read_mapping
from gspn2_diffusion.training.data import split_records, sprites_for
from gspn2_diffusion.training.latents import LatentBatch, LatentFeed, SceneEncoder
from gspn2_diffusion.training.loop import TrainState, fit, prepare_state
from gspn2_diffusion.training.losses import draw_sigmas, flow_matching_errors
from gspn2_diffusion.training.runtime import Run, parameter_count
from gspn2_diffusion.training.sheets import contact_sheet, draw_prompts, read_prompts, save_picture
from gspn2_diffusion.training.text import TextStates

TERMINATED = 143  # what a shell reports for a process that SIGTERM ended

_SCENE_STREAM, _STEP_STREAM, _VALIDATION_STREAM = 21, 22, 23


@dataclass
class FixedSet:
    """Validation scenes with their fixed noise and levels."""

    name: str
    batches: list[tuple[LatentBatch, Tensor, Tensor]]


class DenoiserTask:
    """Losses and measures of denoiser training; see `gspn2_diffusion.training.loop.Task`."""

    def __init__(self, run: Run, config: DenoiserConfig, encoder: SceneEncoder, state: TrainState) -> None:
        self.run, self.config, self.state, self.encoder = run, config, state, encoder
        self._options = SceneOptions(
            config.pair_probability, config.style_probability, config.background_probability
        )
        per_step = config.batch_size * config.gradient_accumulation_steps
        self._refresh = config.refresh or max(1, per_step // 4)
        self._empty = encoder.empty(run.device)
        self._pooled = state.module.config.pooled_projection_dim is not None
        self._judge: Any = None
        self._sets: list[FixedSet] = []
        self.pipeline: Any = None
        records = split_records(config, "train", config.groups, config.styles)
        self._writer = SceneWriter(records, self._options)
        sprites = sprites_for(run, records)
        run.say(f"{len(records):,} training pictures, {self._refresh} new scenes a step")
        if run.is_main:
            self._sets = [self._fixed("train", self._writer, sprites), *self._unseen_sets()]
        self._feed = LatentFeed(
            encoder,
            self._writer,
            sprites,
            seed=(config.seed, run.rank, _SCENE_STREAM),
            step=state.step,
            capacity=max(config.bank_size, 2 * self._refresh),
            refresh=self._refresh,
            initial=min(config.bank_size, 4 * config.batch_size),
            depth=config.prefetch,
        )

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for captions."""
        return self._feed.wait_seconds

    def close(self) -> None:
        """End the caption thread."""
        self._feed.close()

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Flow-matching loss on a random draw of the bank."""
        if micro == 0:
            with torch.autocast(self.run.device.type, enabled=False):
                self._feed.advance()
        config = self.config
        generator = self.run.generator(_STEP_STREAM, step * config.gradient_accumulation_steps + micro)
        batch = self._feed.draw(config.batch_size, generator)
        noise = torch.randn(batch.latents.shape, device=self.run.device, generator=generator)
        sigmas = draw_sigmas(
            config.batch_size,
            weighting=config.weighting,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            shift=config.train_shift,
            device=self.run.device,
            generator=generator,
        )
        dropped = torch.rand(config.batch_size, device=self.run.device, generator=generator)
        text = self._without(batch.text, dropped < config.caption_dropout)
        return flow_matching_errors(model, batch.latents, noise, sigmas, self._conditions(text)).mean()

    def _without(self, text: TextStates, dropped: Tensor) -> TextStates:
        """The captions, some replaced by the encoded empty one."""
        empty, gone = self._empty, dropped[:, None]
        return TextStates(
            torch.where(gone[..., None], empty.hidden.to(text.hidden.dtype), text.hidden),
            torch.where(gone, empty.mask, text.mask),
            torch.where(gone, empty.pooled.to(text.pooled.dtype), text.pooled),
        )

    def _conditions(self, text: TextStates) -> dict[str, Tensor]:
        found = {"encoder_hidden_states": text.hidden, "encoder_attention_mask": text.mask}
        return found | ({"pooled_projections": text.pooled} if self._pooled else {})

    def _unseen_sets(self) -> list[FixedSet]:
        config, split = self.config, "unseen_pair"
        try:
            records = split_records(config, split, config.groups, config.styles)
        except ValueError as error:
            self.run.say(f"no validation on {split}: {error}")
            return []
        return [
            self._fixed(split, SceneWriter(records, self._options, (split,)), sprites_of(self.run, records))
        ]

    def _fixed(self, name: str, writer: SceneWriter, sprites: Tensor) -> FixedSet:
        """Scenes that no training step draws, each with its noise and an evenly spread level."""
        count = -(-self.config.validation_scenes // self._refresh)
        total = count * self._refresh
        generator = torch.Generator("cpu").manual_seed(_VALIDATION_STREAM)
        levels = ((torch.arange(total) + 0.5) / total)[torch.randperm(total, generator=generator)]
        batches = []
        for number in range(count):
            written = self.encoder.write(writer, self._refresh, (_VALIDATION_STREAM, number))
            batch = self.encoder.encode(written, sprites)
            noise = torch.randn(batch.latents.shape, generator=generator).to(self.run.device)
            part = levels[number * self._refresh : (number + 1) * self._refresh]
            batches.append((batch, noise, part.to(self.run.device)))
        return FixedSet(name, batches)

    def judge(self) -> Any:
        """An uncompiled copy with the averaged weights, in the type that is shipped."""
        if self._judge is None:
            made = type(self.state.module).from_config(self.state.architecture)
            self._judge = made.to(self.run.device, self.run.half).eval().requires_grad_(False)
        self.state.copy_average_to(self._judge)
        return self._judge

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Flow-matching loss on the fixed sets, evenly over the noise levels."""
        model, found = self.judge(), {}
        for fixed in self._sets:
            errors = []
            for batch, noise, sigmas in fixed.batches:
                with self.run.autocast():
                    errors.append(
                        flow_matching_errors(
                            model, batch.latents, noise, sigmas, self._conditions(batch.text)
                        )
                    )
            found[f"val_{fixed.name}"] = float(torch.cat(errors).mean())
        return found

    def build_pipeline(self) -> Any:
        """The sampling pipeline around the averaged weights."""
        model = self.judge()
        if self.pipeline is None:
            from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

            self.pipeline = GSPN2Pipeline(
                tokenizer=self.encoder.tokenizer,
                text_encoder=self.encoder.text_encoder,
                vae=self.encoder.vae,
                transformer=model,
                scheduler=FlowMatchEulerDiscreteScheduler(shift=self.config.sampling_shift),
                max_sequence_length=self.config.max_text_tokens,
            )
            self.pipeline.set_progress_bar_config(disable=True)
        return self.pipeline

    def sample(self, step: int) -> None:
        """A sheet of the fixed prompts."""
        if self.config.sheet_prompts is None:
            return
        prompts = read_prompts(self.config.sheet_prompts)
        with torch.no_grad():
            pictures = draw_prompts(
                self.build_pipeline(),
                prompts,
                steps=self.config.sheet_steps,
                guidance=self.config.guidance_scale,
                resolution=self.config.resolution,
            )
        sheet = contact_sheet(pictures, [item.prompt for item in prompts], columns=8)
        save_picture(sheet, self.run.output / "sheets" / f"step-{step:07d}.png")


def sprites_of(run: Run, records: Any) -> Tensor:
    """Sprites on one process alone, without waiting for the others."""
    from gspn2_diffusion.training.emoji import load_sprites

    config = run.config
    sprites = load_sprites(records, size=config.sprite_size, cache_dir=config.sprite_cache, errors="blank")
    return sprites.to(run.device)


def load_encoder(run: Run, config: DenoiserConfig) -> SceneEncoder:
    """The frozen parts, on the device."""
    from transformers import AutoTokenizer, BertModel

    # Stay parallel in the caption thread although sprites are drawn by forked workers (which use none).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    vae: Any = AutoencoderKL.from_pretrained(config.component("vae"), dtype=run.half)
    text_encoder: Any = BertModel.from_pretrained(config.component("text_encoder"), dtype=run.half)
    return SceneEncoder(
        vae.to(run.device, memory_format=torch.channels_last),
        text_encoder.to(run.device),
        AutoTokenizer.from_pretrained(config.component("tokenizer")),
        resolution=config.resolution,
        max_text_tokens=config.max_text_tokens,
        compiled=run.compiles,
    )


def load_denoiser(config: DenoiserConfig) -> Any:
    """A new denoiser of the configuration, or the one to start from, in float32."""
    from gspn2_diffusion.models.initialization import initialize_for_training
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    if config.init_from:
        return GSPN2Transformer2DModel.from_pretrained(config.init_from, dtype=torch.float32)
    model = GSPN2Transformer2DModel.from_config(read_mapping(config.transformer_config))
    initialize_for_training(model)
    return model


def train_denoiser(run: Run, config: DenoiserConfig) -> Path:
    """Train, then write ``transformer/`` and ``pipeline/`` (averaged weights, bf16).

    Returns:
        The pipeline folder.
    """
    encoder = load_encoder(run, config)
    module = load_denoiser(config)
    run.say(f"denoiser {parameter_count(module):,} parameters")
    if config.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    architecture = {key: value for key, value in module.config.items() if not key.startswith("_")}
    state = prepare_state(run, module, architecture)
    task = DenoiserTask(run, config, encoder, state)
    try:
        fit(run, state, task)
    finally:
        task.close()
    if state.terminated:
        raise SystemExit(TERMINATED)
    if run.is_main:
        _finish(task, run, state)
    run.accelerator.wait_for_everyone()
    return run.output / "pipeline"


def _finish(task: DenoiserTask, run: Run, state: TrainState) -> None:
    """Weights first, then what could fail without losing them."""
    model = task.judge().to(torch.bfloat16)
    model.save_pretrained(run.output / "transformer")
    run.say(f"wrote {run.output / 'transformer'}")
    task.judge().to(run.half)
    try:
        task.sample(state.step)
    except Exception as error:
        run.say(f"no picture sheet: {type(error).__name__}: {error}")
    if task.config.save_pipeline:
        write_pipeline(task.build_pipeline(), run.output / "pipeline")
        run.say(f"wrote {run.output / 'pipeline'}")
