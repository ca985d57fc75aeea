"""Few-step denoisers: the student learns to take a stretch of the teacher's guided path in one step.

The path of the teacher from noise to picture, many Euler steps of the guided velocity, is cut into as many
stretches as the student shall have steps. Where a stretch ends follows from where it starts and from the
caption, so the student's target is a fixed function: no average over possible pictures, hence no blur.
Points between the ends lie on the straight line (piecewise rectified flow, arXiv 2405.07510), so that more
steps than these work, too. Guidance is in the targets (arXiv 2210.03142): the student runs once a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.denoiser import (
    DenoiserTask,
    Encoder,
    check_fit,
    fit_and_write,
    load_encoder,
    open_source,
    plain_config,
    write_results,
)
from gspn2_diffusion.training.few_step_config import FewStepConfig
from gspn2_diffusion.training.latents import LatentBatch
from gspn2_diffusion.training.loop import TrainState, prepare_state
from gspn2_diffusion.training.lora import add_adapter, target_names, write_adapter
from gspn2_diffusion.training.rings import TensorRing
from gspn2_diffusion.training.runtime import Run, compile_in_place, parameter_count
from gspn2_diffusion.training.students import load_teacher
from gspn2_diffusion.training.text import TextStates

_PATH_STREAM, _STEP_STREAM = 51, 52
_TIMESTEPS = 1000
_NO_GAP = 1e-9  # where the teacher has as few steps itself


def step_levels(steps: int, shift: float) -> list[float]:
    """Levels that a sampler of `steps` steps passes, from 1 to 0, as the pipeline's scheduler has them."""
    even = [1 - number / steps for number in range(steps + 1)]
    return [shift * level / (1 + (shift - 1) * level) for level in even]


def walk(model: Any, latents: Tensor, conditions: dict[str, Any], levels: list[float]) -> Tensor:
    """Euler steps through noise levels without guidance; (B, C, h, w) float32."""
    for level, following in itertools.pairwise(levels):
        latents = latents + (following - level) * ask(model, latents, level, conditions)
    return latents


def ask(model: Any, latents: Tensor, level: float, conditions: dict[str, Any]) -> Tensor:
    """The velocity (B, C, h, w) float32 at one level."""
    timestep = torch.full((len(latents),), level * _TIMESTEPS, device=latents.device)
    answer = model(latents.to(model.dtype), timestep=timestep, return_dict=False, **conditions)
    return answer[0].float()


class GuidedTeacher:
    """A frozen denoiser with guidance.

    Args:
        model: the denoiser.
        guidance: scale of classifier-free guidance; 1 for none.
    """

    def __init__(self, model: Any, guidance: float) -> None:
        self.model, self._guidance = model, guidance

    @torch.no_grad()
    def path(
        self,
        noise: Tensor,
        conditions: dict[str, Any],
        empty: dict[str, Any],
        levels: list[float],
        every: int,
    ) -> list[Tensor]:
        """States (B, C, h, w) after each `every` of the Euler steps through `levels`, the noise first.

        Args:
            noise: (B, C, h, w) at the first level.
            conditions: of the captions, as the model takes them, B rows.
            empty: of the empty caption, B rows.
            levels: noise levels, falling.
            every: steps of a stretch.
        """
        guided = self._guidance != 1.0
        both = {name: torch.cat([empty[name], conditions[name]]) for name in conditions}
        latents, states = noise, [noise]
        for number, (level, following) in enumerate(itertools.pairwise(levels), start=1):
            if guided:
                without, with_text = ask(self.model, torch.cat([latents] * 2), level, both).chunk(2)
                velocity = without + self._guidance * (with_text - without)
            else:
                velocity = ask(self.model, latents, level, conditions)
            latents = latents + (following - level) * velocity
            if number % every == 0:
                states.append(latents)
        return states


class FewStepTask(DenoiserTask):
    """Stretches of the teacher's paths as training pairs; see `gspn2_diffusion.training.loop.Task`.

    The ring of pairs follows from the step alone, so a resumed run makes the very ring that the interrupted
    one had.

    Args:
        run, config, encoder, state: as in `DenoiserTask`.
        teacher: the guided teacher.
    """

    config: FewStepConfig

    def __init__(
        self, run: Run, config: FewStepConfig, encoder: Encoder, state: TrainState, teacher: GuidedTeacher
    ) -> None:
        # Sheets show what the student is for.
        config = dataclasses.replace(config, sheet_steps=config.student_steps, guidance_scale=1.0)
        self._teacher = teacher
        self._fine = step_levels(config.teacher_steps, config.sampling_shift)
        self._coarse = step_levels(config.student_steps, config.sampling_shift)
        self._every = config.teacher_steps // config.student_steps
        per_chunk = config.paths * config.student_steps
        self._chunks = math.ceil(config.pair_bank / per_chunk)
        self._ring: TensorRing | None = None
        self._wanted: dict[str, list[Tensor]] = {}
        self._coarse_errors: dict[str, float] = {}
        micros = config.gradient_accumulation_steps
        first = max(0, state.step - math.ceil(self._chunks / micros))
        seen = (state.step - first) * config.batch_size * micros * run.world
        at = dataclasses.replace(state, step=first, pictures=max(0, state.pictures - seen))
        super().__init__(run, config, encoder, state, open_source(run, config, encoder, at))
        for number in range(first * micros, state.step * micros):
            self._extend(number)

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Mean squared error of the velocities that the stretches ask for."""
        number = step * self.config.gradient_accumulation_steps + micro
        ring = self._extend(number)
        generator = self.run.generator(_STEP_STREAM, number)
        rows = ring.draw(self.config.batch_size, generator)
        start, end = rows["start"], rows["end"]
        draws = torch.rand(2, len(start), device=start.device, generator=generator)
        along = torch.where(draws[0] < self.config.between_share, draws[1], torch.zeros_like(draws[1]))
        length = rows["level"] - rows["following"]
        latents = start + along.view(-1, 1, 1, 1) * (end - start)
        text = TextStates(rows["hidden"], rows["mask"], rows["pooled"])
        levels = rows["level"] - along * length
        answer = model(latents, timestep=levels * _TIMESTEPS, return_dict=False, **self._words(text))[0]
        return (answer.float() - (start - end) / length.view(-1, 1, 1, 1)).pow(2).mean()

    def _words(self, text: TextStates) -> dict[str, Any]:
        return self.conditions(LatentBatch(torch.empty(0), text))

    def _extend(self, number: int) -> TensorRing:
        """Add the pairs of one micro-step to the ring."""
        config = self.config
        micro = number % config.gradient_accumulation_steps
        generator = self.run.generator(_PATH_STREAM, number)
        batch = self.source.draw(micro, generator)
        count, device = config.paths, self.run.device
        noise = torch.randn((count, *batch.latents.shape[1:]), device=device, generator=generator)
        text = TextStates(*(part[:count] for part in (batch.text.hidden, batch.text.mask, batch.text.pooled)))
        dropped = torch.rand(count, device=device, generator=generator) < config.caption_dropout
        text = self._without(text, dropped)
        with torch.autocast(device.type, enabled=False):
            states = self._path(noise, text, self._fine, self._every)
        rows = self._rows(states, text)
        if self._ring is None:
            self._ring = TensorRing(self._chunks * len(rows["start"]), rows)
        try:
            self._ring.write(number * len(rows["start"]), rows)
        except RuntimeError as error:
            raise ConfigError(
                f"`data` has pictures of several sizes, a few-step model is made at one: "
                f"give `max_aspect_ratio` 1 ({error})"
            ) from error
        return self._ring

    def _path(self, noise: Tensor, text: TextStates, levels: list[float], every: int) -> list[Tensor]:
        empty = self._without(text, torch.ones(len(noise), dtype=torch.bool, device=noise.device))
        return self._teacher.path(noise, self._words(text), self._words(empty), levels, every)

    def _rows(self, states: list[Tensor], text: TextStates) -> dict[str, Tensor]:
        """The stretches of some paths, one below the other."""
        count, steps = len(states[0]), len(states) - 1
        levels = torch.tensor(self._coarse, device=states[0].device)

        def repeated(part: Tensor) -> Tensor:
            return part.repeat(steps, *(1 for _ in part.shape[1:]))

        return {
            "start": torch.cat(states[:-1]),
            "end": torch.cat(states[1:]),
            "level": levels[:-1].repeat_interleave(count),
            "following": levels[1:].repeat_interleave(count),
            "hidden": repeated(text.hidden),
            "mask": repeated(text.mask),
            "pooled": repeated(text.pooled),
        }

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """How far the student's pictures are from the teacher's of the same noise.

        ``val_*``: mean square of the difference over that of the teacher's latents. ``gap_closed_*``: 0 is
        the teacher in as few steps, 1 the teacher in all its steps.
        """
        found = self.measure(self.judge())
        self._keep_best(found)
        for name, coarse in self._coarse_errors.items():
            if coarse > _NO_GAP:
                found[f"gap_closed_{name}"] = 1 - found[f"val_{name}"] / coarse
        return found

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Errors of a model's pictures of the fixed sets."""
        found = {}
        for fixed in self._sets:
            wanted = self._teacher_pictures(fixed)
            drawn = [
                walk(model, noise, self.conditions(batch), self._coarse) for batch, noise, _ in fixed.batches
            ]
            found[f"val_{fixed.name}"] = _relative_error(drawn, wanted)
        return found

    def _teacher_pictures(self, fixed: Any) -> list[Tensor]:
        """What the teacher draws of a fixed set, drawn once; also its error in as few steps."""
        if fixed.name not in self._wanted:
            steps = len(self._fine) - 1
            wanted, coarse = (
                [self._path(noise, batch.text, levels, every)[-1] for batch, noise, _ in fixed.batches]
                for levels, every in ((self._fine, steps), (self._coarse, len(self._coarse) - 1))
            )
            self._wanted[fixed.name] = wanted
            self._coarse_errors[fixed.name] = _relative_error(coarse, wanted)
        return self._wanted[fixed.name]

    def _make_judge(self) -> Any:
        if self.config.lora_rank:
            return make_student(self._teacher.model, self.config, self.run.half)
        return super()._make_judge()

    def pipeline_settings(self) -> dict[str, Any]:
        """The model folder says how the student is to be used, unless that is an adapter beside it."""
        if self.config.lora_rank:
            return super().pipeline_settings()
        return {
            **super().pipeline_settings(),
            "default_steps": self.config.student_steps,
            "default_guidance_scale": 1.0,
        }


def _relative_error(drawn: list[Tensor], wanted: list[Tensor]) -> float:
    one, other = torch.cat(drawn), torch.cat(wanted)
    return float((one - other).pow(2).mean() / other.pow(2).mean().clamp(min=1e-12))


def train_few_steps(run: Run, config: FewStepConfig) -> Path:
    """Distil, then write ``transformer/``, or of an adapter ``lora/``, and ``pipeline/`` (averaged, bf16).

    Returns:
        The pipeline folder.

    Raises:
        ConfigError: the teacher is no model of ours, or does not fit the frozen models.
    """
    teacher = load_teacher(config.teacher_folder(), run.half).to(run.device)
    if type(teacher).__name__ != "GSPN2Transformer2DModel":
        raise ConfigError(f"`teacher` is a {type(teacher).__name__}; allowed: GSPN2Transformer2DModel")
    encoder = load_encoder(run, config)
    check_fit(teacher, encoder)
    student = make_student(teacher, config, run.half)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    trained = sum(param.numel() for param in student.parameters() if param.requires_grad)
    run.say(
        f"denoiser {parameter_count(teacher):,} parameters, {trained:,} trained{_kind(config)}, "
        f"from {config.teacher_steps} steps with guidance {config.teacher_guidance:g} "
        f"to {config.student_steps} without"
    )
    compile_in_place(run, teacher)
    adapter = {name: getattr(config, name) for name in ("lora_rank", "lora_alpha") if config.lora_rank}
    state = prepare_state(run, student, plain_config(student) | adapter)
    task = FewStepTask(run, config, encoder, state, GuidedTeacher(teacher, config.teacher_guidance))
    fit_and_write(task, run, state, _write_adapter if config.lora_rank else write_results)
    return run.output / "pipeline"


def make_student(teacher: Any, config: FewStepConfig, dtype: torch.dtype) -> Any:
    """A copy of the teacher in float32, or in `dtype` with a fresh adapter on all its linear layers."""
    student = type(teacher).from_config(plain_config(teacher))
    student.load_state_dict({name: value.float() for name, value in teacher.state_dict().items()})
    if not config.lora_rank:
        return student
    rank, alpha = config.lora_rank, config.lora_alpha or config.lora_rank
    return add_adapter(student.to(dtype), target_names(student, ["*"]), r=rank, lora_alpha=alpha)


def _kind(config: FewStepConfig) -> str:
    return f" (an adapter of rank {config.lora_rank})" if config.lora_rank else ""


def _write_adapter(task: FewStepTask, run: Run, state: TrainState) -> None:
    """``lora/``, a sheet, and ``pipeline/``: the teacher's model with the adapter beside it."""
    write_adapter(task, run, state, torch.bfloat16)
    task.final_sheet(state.step)
    if task.config.save_pipeline:
        pipeline = task.build_pipeline()
        pipeline.unload_lora_weights()
        pipeline.add_few_steps(run.output / "lora", task.config.student_steps)
        task.write_pipeline(pipeline)
