"""Schedules and schedulers: the defaults, explicit ones, and that other solvers reach the same end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def latents_of(pipe: GSPN2Pipeline, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"output_type": "latent", "generator": generator, "guidance_scale": 1.5, **options}
    return pipe("a red apple", **settings).images


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(**FLOW),
    ],
    ids=["heun", "dpm-solver++", "unipc"],
)
def test_other_solvers_reach_the_same_end(pipe: GSPN2Pipeline, scheduler: Any) -> None:
    end = latents_of(pipe, num_inference_steps=80)
    one_step = latents_of(pipe, num_inference_steps=1)
    pipe.scheduler = scheduler
    other = latents_of(pipe, num_inference_steps=20)
    assert (
        other - end
    ).norm() < 0.1 * end.norm()  # a random denoiser is rough in time; 0.03 to 0.06 in practice
    assert (one_step - end).norm() > 0.4 * end.norm()  # so that the line above says something


def test_swap_from_config_keeps_working(pipe: GSPN2Pipeline) -> None:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="sde-dpmsolver++", **FLOW
    )
    first = latents_of(pipe, num_inference_steps=4)
    assert torch.allclose(first, latents_of(pipe, num_inference_steps=4), atol=1e-5)  # the noise comes again
    assert first.isfinite().all()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = latents_of(pipe, num_inference_steps=4, num_images_per_prompt=2, generator=generators)
    assert torch.allclose(both[:1], first, atol=1e-4)  # the solver's own noise is per picture as well


def test_heun_progress_counts_steps_not_calls(pipe: GSPN2Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    pipe.set_progress_bar_config(disable=False)
    latents_of(pipe, num_inference_steps=3)
    assert pipe.num_timesteps == 5
    assert "3/3" in capfd.readouterr().err


def test_default_sigmas_spend_no_step_at_zero(pipe: GSPN2Pipeline) -> None:
    latents_of(pipe, num_inference_steps=4)
    assert torch.allclose(pipe.scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_explicit_schedules(pipe: GSPN2Pipeline) -> None:
    by_sigmas = latents_of(pipe, sigmas=[1.0, 0.6, 0.1])
    assert pipe.num_timesteps == 3
    assert torch.allclose(pipe.scheduler.sigmas, torch.tensor([1.0, 0.6, 0.1, 0.0]))
    by_timesteps = latents_of(pipe, timesteps=[1000, 600, 100])
    assert torch.allclose(by_sigmas, by_timesteps, atol=1e-5)


def test_static_shift_comes_from_the_scheduler(pipe: GSPN2Pipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents_of(pipe, num_inference_steps=2)
    assert torch.allclose(pipe.scheduler.sigmas, torch.tensor([1.0, 0.75, 0.0]))  # 3 s / (1 + 2 s) at s = 0.5


def test_dynamic_shift_grows_with_the_picture(pipe: GSPN2Pipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=1.0
    )
    for size, mu in ((16, 0.5), (32, 1.0)):  # 4 x 4 and 8 x 8 tokens
        latents_of(pipe, num_inference_steps=2, height=size, width=size)
        shifted = torch.tensor(mu).exp() / (torch.tensor(mu).exp() + 1)  # at sigma = 0.5
        assert torch.allclose(pipe.scheduler.sigmas, torch.tensor([1.0, float(shifted), 0.0]))


def test_scheduler_without_explicit_sigmas_says_so(pipe: GSPN2Pipeline) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="sigmas"):
        latents_of(pipe, sigmas=[1.0, 0.5])
