"""Distillation of an attention denoiser into its GSPN-2 form: alignment block by block, then end to end."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training import checkpoint as ckpt
from gspn2_diffusion.training.alignment import BlockAlignment, EndToEnd
from gspn2_diffusion.training.config import ConfigError, model_folder
from gspn2_diffusion.training.denoiser import (
    DenoiserTask,
    Encoder,
    check_terminated,
    load_encoder,
    plain_config,
)
from gspn2_diffusion.training.distill_config import DistillConfig
from gspn2_diffusion.training.latents import LatentBatch
from gspn2_diffusion.training.loop import TrainState, fit, prepare_state
from gspn2_diffusion.training.picture_sources import find_format
from gspn2_diffusion.training.runtime import Run, parameter_count
from gspn2_diffusion.training.stock import StockModels, load_stock
from gspn2_diffusion.training.students import find_sites, load_teacher, make_student

_STEP_STREAM = 41
_STAGE_SEEDS = {1: 0, 2: 1_000_003}  # the second stage sees other noise than the first


class DistillTask(DenoiserTask):
    """One stage: batches as in denoiser training, the loss of its module, and the gap that is closed.

    Args:
        run, config, encoder: as in `DenoiserTask`.
        state: of a `BlockAlignment` or `EndToEnd`, which holds the student as ``student``.
        gap: what is to be closed; made at the first validation.
        judge: a copy of the student made before its weights were split; None copies it when it is needed.
    """

    def __init__(
        self, run: Run, config: DistillConfig, encoder: Encoder, state: TrainState, gap: Gap, judge: Any
    ) -> None:
        student = state.module.student
        self._student, self.gap = student, gap
        proxy = dataclasses.replace(state, module=student)  # what the source asks the model's settings of
        super().__init__(run, config, encoder, proxy)
        self.state = state
        if judge is not None:
            self._judge = self._prepared(judge)

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """The stage's loss on the next batch."""
        number = step * self.config.gradient_accumulation_steps + micro
        batch, noise, levels = self.draw(micro, self.run.generator(_STEP_STREAM, number))
        question = self.objective.question(batch.latents, noise, levels)
        return model(question, self.conditions(batch))

    def conditions(self, batch: LatentBatch) -> dict[str, Any]:
        """The keyword arguments of our model, or of one of diffusers'."""
        if isinstance(self.encoder, StockModels):
            return self.encoder.conditions(batch.text, batch.latents)
        return super().conditions(batch)

    def build_pipeline(self) -> Any:
        """The sampling pipeline around the averaged student."""
        if not isinstance(self.encoder, StockModels):
            return super().build_pipeline()
        model = self.judge()
        if self.pipeline is None:
            self.pipeline = self.encoder.with_denoiser(model)
        return self.pipeline

    def judge(self) -> Any:
        """A copy of the student with the averaged weights, in the type that is shipped."""
        if self._judge is None:
            self._judge = self._prepared(copy.deepcopy(self._student))
        copy_student(self.state, self._judge)
        return self._judge

    def _prepared(self, copied: nn.Module) -> Any:
        return strip_hooks(copied).to(self.run.device, self.run.half).eval().requires_grad_(False)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Loss on the fixed sets and how much of the gap to the teacher is closed on each."""
        found = self.measure(self.judge())
        return found | self.gap.closed(found)


class Gap:
    """Losses of the teacher and of the swapped, untrained student; kept in ``gap.json``.

    Args:
        file: where they are kept, so that a resumed run measures against the same student.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._ends: dict[str, dict[str, float]] | None = None
        if file.is_file():
            self._ends = json.loads(file.read_text(encoding="utf-8"))

    @property
    def is_known(self) -> bool:
        """Whether both ends were measured."""
        return self._ends is not None

    def set(self, teacher: dict[str, float], untrained: dict[str, float]) -> None:
        """Keep both ends."""
        self._ends = {"teacher": teacher, "untrained": untrained}
        part = self._file.with_name(f".{self._file.name}.part")
        part.write_text(json.dumps(self._ends, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self._file)

    def closed(self, found: dict[str, float]) -> dict[str, float]:
        """Share of the gap that losses have closed: 0 untrained, 1 as good as the teacher."""
        if self._ends is None:
            return {}
        shares = {}
        for name, value in found.items():
            teacher, untrained = (self._ends[end][name] for end in ("teacher", "untrained"))
            if untrained > teacher:
                shares[name.replace("val_", "gap_closed_")] = (untrained - value) / (untrained - teacher)
        return shares


def strip_hooks(model: nn.Module) -> nn.Module:
    """Take out the hooks of distillation; those that a converted model needs are pre-hooks and stay."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
    return model


def copy_student(state: TrainState, target: nn.Module) -> None:
    """Give another student the averaged weights of the one in training; frozen ones stay as they are."""
    targets = dict(target.named_parameters())
    with torch.no_grad():
        for name, source in state.whole_averages().items():
            if name.startswith("student."):
                targets[name.removeprefix("student.")].copy_(source)


def train_distilled(run: Run, config: DistillConfig) -> Path:
    """Both stages, then the student as ``transformer/`` and ``pipeline/``.

    Returns:
        The student's folder.
    """
    teacher = load_teacher(config.teacher_folder(), run.half).to(run.device)
    encoder, config = _encoder(run, config, teacher)
    run = dataclasses.replace(run, config=config)
    student = make_student(teacher, config).to(run.device)
    sites = find_sites(teacher, student)
    run.say(
        f"teacher {parameter_count(teacher):,} parameters, student {parameter_count(student):,}, "
        f"{len(sites)} layers replaced"
    )
    if run.is_main and config.resume_from == "none":
        for name in ("gap.json", "stage-1/done.json"):  # of an earlier run in this folder
            (run.output / name).unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    gap = Gap(run.output / "gap.json")
    student = _align(run, config, encoder, (student, teacher, sites), gap)
    strip_hooks(student).requires_grad_(config.train_all)
    for site in sites:
        student.get_submodule(site.name).requires_grad_(True)
    if config.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    weights = (config.task_weight, config.output_weight, config.mixer_tap_weight, config.block_tap_weight)
    module = EndToEnd(student, teacher, sites, weights, config.adapter_rank)
    own = dataclasses.replace(config, seed=config.seed + _STAGE_SEEDS[2])
    task = _stage(dataclasses.replace(run, config=own), own, encoder, module, gap, teacher)
    if run.is_main:
        _finish(task, run)
    run.accelerator.wait_for_everyone()
    return run.output / _component(encoder)


def _encoder(run: Run, config: DistillConfig, teacher: Any) -> tuple[Encoder, DistillConfig]:
    """The frozen models that go with the teacher, and the settings with its kind of prediction."""
    if type(teacher).__name__ == "GSPN2Transformer2DModel":
        return load_encoder(run, config), config
    kind = find_format(config.data) if config.data_format == "auto" else config.data_format
    if kind == "emoji":
        raise ConfigError("`data`: emoji scenes are for our own models; give a folder of pictures")
    folder = model_folder(str(config.pretrained))
    stock = load_stock(folder, teacher, run.half, config.max_text_tokens)
    return stock, dataclasses.replace(config, prediction=stock.prediction)


def _component(encoder: Encoder) -> str:
    """Name of the denoiser in its pipeline."""
    return encoder.component if isinstance(encoder, StockModels) else "transformer"


def _align(run: Run, config: DistillConfig, encoder: Encoder, models: tuple[Any, Any, Any], gap: Gap) -> Any:
    """Stage 1; returns the student with the averaged mixers: a copy where the trained one is split."""
    student, teacher, sites = models
    if config.stage1_steps == 0:
        return student
    aligned = copy.deepcopy(student).cpu() if run.splits else student
    output = run.output / "stage-1"
    output.mkdir(parents=True, exist_ok=True)
    own = dataclasses.replace(
        config,
        output_dir=str(output),
        max_train_steps=config.stage1_steps,
        max_train_minutes=config.stage1_minutes,
        learning_rate=config.stage1_learning_rate,
        resume_from=config.resume_from if config.resume_from in ("none", "latest") else "latest",
        final_checkpoint=True,
        save_compact=None,
        keep_best=None,
    )
    done = output / "done.json"
    if done.is_file() and own.resume_from == "latest":
        own = dataclasses.replace(own, max_train_steps=1, max_train_minutes=None)
    stage = dataclasses.replace(run, config=own, output=output, started=time.monotonic())
    task = _stage(stage, own, encoder, BlockAlignment(student, teacher, sites), gap, teacher)
    if run.is_main and not done.is_file():
        done.write_text(json.dumps({"step": task.state.step}) + "\n", encoding="utf-8")
    task.state.gather_averages(keep=True)
    copy_student(task.state, aligned)
    run.accelerator.free_memory()  # else the first stage's gradient hooks would answer in the second
    run.accelerator.wait_for_everyone()
    return aligned.to(run.device)


def _stage(
    run: Run, config: DistillConfig, encoder: Encoder, module: Any, gap: Gap, teacher: Any
) -> DistillTask:
    """Train one stage to the end of its budget."""
    run.say(f"stage of {type(module).__name__}: {_trained(module):,} trained parameters")
    architecture = plain_config(module.student) | {"stage": type(module).__name__}
    judge = copy.deepcopy(module.student) if run.splits and run.is_main else None
    state = prepare_state(run, module, _as_json(architecture))
    task = DistillTask(run, config, encoder, state, gap, judge)
    state.gather_averages(run.is_main)
    if run.is_main and not gap.is_known:
        gap.set(task.measure(teacher), task.measure(task.judge()))
        run.say(f"losses of the teacher and of the untrained student are in {gap._file}")
    try:
        fit(run, state, task)
    finally:
        task.close()
    check_terminated(state)
    return task


def _finish(task: DistillTask, run: Run) -> None:
    """The student alone; adapters and teacher stay behind."""
    model = task.judge().to(torch.bfloat16)
    target = run.output / _component(task.encoder)
    part = target.with_name(f".{target.name}.part")
    model.save_pretrained(part)
    ckpt.replace_folder(part, target)
    run.say(f"wrote {target}")
    task.judge().to(run.half)
    task.final_sheet(task.state.step)
    if task.config.save_pipeline:
        task.write_pipeline(task.build_pipeline())


def _trained(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def _as_json(mapping: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint gives it back: tuples become lists."""
    return json.loads(json.dumps(mapping))
