"""Training of the text-to-image denoiser on latents and text states of any source."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from gspn2_diffusion.training.assembly import write_pipeline
from gspn2_diffusion.training.caption_layout import is_untaught, teach_layout
from gspn2_diffusion.training.captions import SceneWriter
from gspn2_diffusion.training.checkpoint import find_resume, replace_folder
from gspn2_diffusion.training.config import (
    ConfigError,
    DenoiserConfig,
    model_folder,
    read_mapping,
    unknown_setting,
)
from gspn2_diffusion.training.data import split_records
from gspn2_diffusion.training.frozen import FrozenModels, load_text_encoder, load_vae
from gspn2_diffusion.training.growth import grow_denoiser
from gspn2_diffusion.training.latents import LatentBatch, SceneEncoder
from gspn2_diffusion.training.loop import TrainState, fit, prepare_state
from gspn2_diffusion.training.model_card import write_card
from gspn2_diffusion.training.objective import make_objective
from gspn2_diffusion.training.picture_sources import find_format
from gspn2_diffusion.training.runtime import Run, parameter_count
from gspn2_diffusion.training.scene_setup import scene_options
from gspn2_diffusion.training.sheets import (
    SheetPrompt,
    contact_sheet,
    draw_prompts,
    read_prompts,
    save_picture,
)
from gspn2_diffusion.training.sources import FixedSet, LatentSource, PictureSource, SceneSource
from gspn2_diffusion.training.text import TextStates

TERMINATED = 143  # what a shell reports for a process that SIGTERM ended

_STEP_STREAM = 22
Encoder = SceneEncoder | FrozenModels


class DenoiserTask:
    """Losses and measures of denoiser training; see `gspn2_diffusion.training.loop.Task`.

    Args:
        run: the run.
        config: settings.
        encoder: the frozen models.
        state: what is trained.
        source: where batches come from; None opens the one that the settings name.
    """

    def __init__(
        self,
        run: Run,
        config: DenoiserConfig,
        encoder: Encoder,
        state: TrainState,
        source: LatentSource | None = None,
    ) -> None:
        self.run, self.config, self.state, self.encoder = run, config, state, encoder
        self._empty = encoder.empty(run.device)
        self._pooled = pooled_size(state.module) is not None
        self._judge: Any = None
        self._best = float("inf")
        self.pipeline: Any = None
        self.source = source or open_source(run, config, encoder, state)
        self._sets: list[FixedSet] = self.source.fixed_sets() if run.is_main else []
        scheduler = getattr(encoder, "scheduler_config", None)
        self.objective = make_objective(config, vae_scale(encoder), scheduler)

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for data."""
        return self.source.wait_seconds

    def close(self) -> None:
        """End the threads of the source."""
        self.source.close()

    def describe_batch(self, step: int) -> str:
        """What this process's batch of a step was made of."""
        return self.source.describe(step)

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Mean weighted error on the next batch."""
        generator = self.run.generator(_STEP_STREAM, step * self.config.gradient_accumulation_steps + micro)
        batch, noise, levels = self.draw(micro, generator)
        question = self.objective.question(batch.latents, noise, levels)
        return question.errors(question.ask(model, self.conditions(batch))).mean()

    def draw(self, micro: int, generator: torch.Generator) -> tuple[LatentBatch, Tensor, Tensor]:
        """The next batch, some of its captions dropped, with noise and levels."""
        batch = self.source.draw(micro, generator)
        noise = torch.randn(batch.latents.shape, device=self.run.device, generator=generator)
        levels = self.objective.draw(batch.latents, generator)
        dropped = torch.rand(len(batch.latents), device=self.run.device, generator=generator)
        text = self._without(batch.text, dropped < self.config.caption_dropout)
        return LatentBatch(batch.latents, text), noise, levels

    def _without(self, text: TextStates, dropped: Tensor) -> TextStates:
        """The captions, some replaced by the encoded empty one."""
        empty, gone = self._empty, dropped[:, None]
        return TextStates(
            torch.where(gone[..., None], empty.hidden.to(text.hidden.dtype), text.hidden),
            torch.where(gone, empty.mask, text.mask),
            torch.where(gone, empty.pooled.to(text.pooled.dtype), text.pooled),
        )

    def conditions(self, batch: LatentBatch) -> dict[str, Any]:
        """The model's keyword arguments."""
        text = batch.text
        found = {"encoder_hidden_states": text.hidden, "encoder_attention_mask": text.mask}
        return found | ({"pooled_projections": text.pooled} if self._pooled else {})

    def judge(self) -> Any:
        """An uncompiled copy with the averaged weights, in the type that is shipped."""
        if self._judge is None:
            self._judge = self._make_judge().to(self.run.device, self.run.half).eval().requires_grad_(False)
        self.state.copy_average_to(self._judge)
        return self._judge

    def _make_judge(self) -> Any:
        return type(self.state.module).from_config(self.state.architecture)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Loss on the fixed sets, evenly over the noise levels."""
        found = self.measure(self.judge())
        self._keep_best(found)
        return found

    def _keep_best(self, found: dict[str, float]) -> None:
        """Write the averaged weights to ``best`` whenever the measure that the settings name has fallen."""
        value = found.get(self.config.keep_best or "")
        if value is None or value >= self._best:
            return
        self._best = value
        part = self.run.output / ".best.part"
        self._judge.save_pretrained(part)
        replace_folder(part, self.run.output / "best")

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Loss of a model on the fixed sets."""
        found = {}
        for fixed in self._sets:
            errors = []
            for batch, noise, levels in fixed.batches:
                with self.run.autocast():
                    question = self.objective.question(batch.latents, noise, levels)
                    errors.append(question.errors(question.ask(model, self.conditions(batch))))
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
                **self.pipeline_settings(),
            )
            self.pipeline.set_progress_bar_config(disable=True)
        return self.pipeline

    def pipeline_settings(self) -> dict[str, Any]:
        """What the pipeline's configuration says besides its components."""
        return {"max_sequence_length": self.config.max_text_tokens}

    def sample(self, step: int) -> None:
        """A sheet of the fixed prompts, or of the first captions where there are none."""
        prompts = self._prompts()
        if not prompts:
            return
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

    def final_sheet(self, step: int) -> None:
        """The last sheet; the weights are on the disk, so it may fail."""
        try:
            self.sample(step)
        except Exception as error:
            self.run.say(f"no picture sheet: {type(error).__name__}: {error}")

    def write_pipeline(self, pipeline: Any) -> None:
        """Write ``pipeline/`` with a model card."""
        target = self.run.output / "pipeline"
        write_pipeline(pipeline, target)
        write_card(target, self.config, self.state, self.run)
        self.run.say(f"wrote {target}")

    def _prompts(self) -> list[SheetPrompt]:
        if self.config.sheet_prompts is not None:
            return read_prompts(self.config.sheet_prompts)
        return [SheetPrompt(text, number) for number, text in enumerate(self.source.prompts)]


def pooled_size(model: Any) -> int | None:
    """Channels of the pooled text that a model wants; None for a model that wants none."""
    return model.config.get("pooled_projection_dim")


def vae_scale(encoder: Encoder) -> int:
    """Pixels per latent along a side."""
    from gspn2_diffusion.pipelines.sampling import vae_scale_factor

    return vae_scale_factor(encoder.vae)


def open_source(run: Run, config: DenoiserConfig, encoder: Encoder, state: TrainState) -> LatentSource:
    """The source of the data that the settings name, at the place where the state stands."""
    if isinstance(encoder, SceneEncoder):
        return SceneSource(run, config, encoder, state.step)
    multiple = getattr(encoder, "multiple", None)
    if multiple is None:
        multiple = encoder.vae_scale * int(state.module.config.get("patch_size") or 1)
    return PictureSource(run, config, encoder, multiple=multiple, pictures=state.pictures, step=state.step)


def load_encoder(run: Run, config: DenoiserConfig) -> Encoder:
    """The frozen parts, on the device: with scenes for emoji, plain for pictures."""
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(config.component("tokenizer"))
    kind = find_format(config.data) if config.data_format == "auto" else config.data_format
    if kind != "emoji":
        vae = load_vae(config.component("vae"), run.half).to(run.device)
        text_encoder = load_text_encoder(config.component("text_encoder"), run.half).to(run.device)
        return FrozenModels(vae, text_encoder, tokenizer, config.max_text_tokens)
    # Stay parallel in the caption thread although sprites are drawn by forked workers (which use none).
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    kl: Any = AutoencoderKL.from_pretrained(config.component("vae"), dtype=run.half)
    bert: Any = BertModel.from_pretrained(config.component("text_encoder"), dtype=run.half)
    return SceneEncoder(
        kl.to(run.device, memory_format=torch.channels_last),
        bert.to(run.device),
        tokenizer,
        resolution=config.resolution,
        max_text_tokens=config.max_text_tokens,
        compiled=run.compiles,
    )


def load_denoiser(config: DenoiserConfig) -> Any:
    """A new denoiser of the configuration, the one to start from grown to it, in float32."""
    from gspn2_diffusion.models.initialization import initialize_for_training
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    file = config.transformer_config or config.component("transformer") / "config.json"
    changes = {"mixer": config.mixer} if config.mixer else {}
    settings = {**read_mapping(file), **changes}
    known = list(inspect.signature(GSPN2Transformer2DModel.__init__).parameters)[1:]
    for name in settings:
        if name not in known and not name.startswith("_"):
            raise ConfigError(f"{file}: {unknown_setting(name, known)}")
    try:
        model = GSPN2Transformer2DModel.from_config(settings)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    if config.init_from:
        folder = model_folder(config.init_from)
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        source = GSPN2Transformer2DModel.from_pretrained(folder, dtype=torch.float32)
        return grow_denoiser(source, model)
    initialize_for_training(model)
    return model


def plain_config(module: Any) -> dict[str, Any]:
    """A model's configuration without what libraries note in it."""
    return {key: value for key, value in module.config.items() if not key.startswith("_")}


def check_terminated(state: TrainState) -> None:
    """Leave with the exit code of SIGTERM if that is what ended the run."""
    if state.terminated:
        raise SystemExit(TERMINATED)


def check_fit(module: Any, encoder: Encoder) -> None:
    """Raise ConfigError unless the denoiser takes the latents and texts of the frozen models."""
    text: Any = encoder.text_encoder
    pairs = (
        ("in_channels", "vae", encoder.vae.config.latent_channels),
        ("caption_channels", "text_encoder", text.config.hidden_size),
    )
    for name, part, given in pairs:
        wanted = module.config.get(name)
        if wanted is not None and wanted != given:
            raise ConfigError(f"`{part}` gives {given} channels; the denoiser's {name} is {wanted}")


def train_denoiser(run: Run, config: DenoiserConfig) -> Path:
    """Train, then write ``transformer/`` and ``pipeline/`` (averaged weights, bf16).

    Returns:
        The pipeline folder.
    """
    encoder = load_encoder(run, config)
    module = load_denoiser(config)
    check_fit(module, encoder)
    run.say(f"denoiser {parameter_count(module):,} parameters")
    if config.gradient_checkpointing:
        module.enable_gradient_checkpointing()
    prepare_captions(run, config, encoder, module)
    state = prepare_state(run, module, plain_config(module))
    task = DenoiserTask(run, config, encoder, state)
    fit_and_write(task, run, state, write_results)
    return run.output / "pipeline"


def prepare_captions(run: Run, config: DenoiserConfig, encoder: Encoder, module: Any) -> None:
    """New caption layers learn where things stand, at the start of a run on scenes that asks for it."""
    if not config.caption_layout_steps or not isinstance(encoder, SceneEncoder) or not is_untaught(module):
        return
    if find_resume(config.resume_from, run.output) is not None:
        return
    records = split_records(config, "train", config.groups, config.styles)
    writer = SceneWriter(records, scene_options(config))
    module.to(run.device)
    right = teach_layout(
        run, module, encoder, writer, steps=config.caption_layout_steps, batch=config.caption_layout_batch
    )
    run.say(f"caption layers: {right:.1%} of the words of scenes with several things say where these stand")
    run.record(caption_layout=right)


def fit_and_write(
    task: DenoiserTask, run: Run, state: TrainState, write: Callable[[Any, Run, TrainState], None]
) -> None:
    """Train to the end of the budget; then the first process writes while the others wait."""
    try:
        fit(run, state, task)
    finally:
        task.close()
    check_terminated(state)
    if run.is_main:
        write(task, run, state)
    run.accelerator.wait_for_everyone()


def write_results(task: DenoiserTask, run: Run, state: TrainState) -> None:
    """``transformer/``, a sheet, ``pipeline/``: weights first, then what could fail without losing them."""
    model = task.judge().to(torch.bfloat16)
    model.save_pretrained(run.output / "transformer")
    run.say(f"wrote {run.output / 'transformer'}")
    task.judge().to(run.half)
    task.final_sheet(state.step)
    if task.config.save_pipeline:
        task.write_pipeline(task.build_pipeline())
