"""Guidance interval, rescale and diffusers' guiders, on the denoiser's batches and against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    SkipLayerGuidance,
)

from gspn2_diffusion.pipelines.guidance import Guidance
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

STEPS = 4


# Compared up to 1e-4 where batches differ: latents reach 10, of which float32 keeps 1e-6, before guidance.
def latents_of(pipe: GSPN2Pipeline, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator, **options}
    return pipe("a red apple", **settings).images


def rows_of(pipe: GSPN2Pipeline, **options: Any) -> list[int]:
    rows: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].shape[0])
    )
    latents_of(pipe, **options)
    handle.remove()
    return rows


@pytest.mark.parametrize(
    ("interval", "rows"),
    [
        ((0.0, 1.0), [2, 2, 2, 2]),
        ((0.25, 0.75), [1, 2, 2, 1]),
        ((0.5, 1.0), [1, 1, 2, 2]),
        ([0.0, 0.1], [2, 1, 1, 1]),
        ((0.3, 0.3), [1, 1, 1, 1]),
    ],
)
def test_interval_saves_denoiser_work(pipe: GSPN2Pipeline, interval: Any, rows: list[int]) -> None:
    assert rows_of(pipe, guidance_interval=interval) == rows


def test_interval_ends_are_full_and_no_guidance(pipe: GSPN2Pipeline) -> None:
    assert torch.equal(latents_of(pipe, guidance_interval=(0.0, 1.0)), latents_of(pipe))
    none = latents_of(pipe, guidance_scale=1.0)
    torch.testing.assert_close(latents_of(pipe, guidance_interval=(1.0, 1.0)), none, atol=1e-5, rtol=0)
    assert (latents_of(pipe, guidance_interval=(0.25, 0.75)) - none).abs().max() > 0.01


def test_interval_treats_both_calls_of_a_heun_step_alike(pipe: GSPN2Pipeline) -> None:
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    assert rows_of(pipe, guidance_interval=(0.25, 0.75)) == [1, 1, 2, 2, 2, 2, 1]


def test_rescale_gives_the_guided_prediction_the_deviation_of_the_one_with_the_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    without, with_prompt = torch.randn(2, 3, 4, 8, 8, generator=generator)
    full = Guidance(rescale=1.0).combine(without, with_prompt, 6.0)
    plain = Guidance().combine(without, with_prompt, 6.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), with_prompt.std(dim=(1, 2, 3)))
    half = Guidance(rescale=0.5).combine(without, with_prompt, 6.0)
    torch.testing.assert_close(half, (full + plain) / 2)


def test_rescale_reaches_the_picture(pipe: GSPN2Pipeline) -> None:
    plain = latents_of(pipe)
    assert torch.equal(latents_of(pipe, guidance_rescale=0.0), plain)
    assert (latents_of(pipe, guidance_rescale=0.7) - plain).abs().max() > 0.01


def test_guider_of_plain_guidance_equals_guidance_scale(pipe: GSPN2Pipeline) -> None:
    guided = latents_of(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    torch.testing.assert_close(guided, latents_of(pipe, guidance_scale=3.0), atol=1e-4, rtol=0)
    part = latents_of(pipe, guider=ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75))
    expected = latents_of(pipe, guidance_scale=3.0, guidance_interval=(0.25, 0.75))
    torch.testing.assert_close(part, expected, atol=1e-4, rtol=0)


def test_adaptive_projected_guidance(pipe: GSPN2Pipeline) -> None:
    """With eta 1, no momentum and no bound on the norm it is plain guidance; each of them changes it."""
    loose = {"guidance_scale": 3.0, "adaptive_projected_guidance_rescale": 0.0}
    plain = latents_of(pipe, guidance_scale=3.0)
    guided = latents_of(pipe, guider=AdaptiveProjectedGuidance(**loose))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)
    for change in ({"eta": 0.0}, {"adaptive_projected_guidance_momentum": -0.5}):
        guider = AdaptiveProjectedGuidance(**loose, **change)
        changed = latents_of(pipe, guider=guider)
        assert (changed - plain).abs().max() > 0.01, change
        assert torch.equal(latents_of(pipe, guider=guider), changed)  # its state starts anew in every call
    bounded = AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_rescale=0.1)
    assert (latents_of(pipe, guider=bounded) - plain).abs().max() > 0.01


def test_a_guider_is_forgotten_by_the_next_call(pipe: GSPN2Pipeline) -> None:
    before = latents_of(pipe)
    latents_of(pipe, guider=AdaptiveProjectedGuidance(), guidance_scale=1.0)
    assert torch.equal(latents_of(pipe), before)


ERRORS = {
    "end before start": ({"guidance_interval": (0.7, 0.2)}, ValueError, "not end before it starts"),
    "outside": (
        {"guidance_interval": (0.0, 1.5)},
        ValueError,
        r"`guidance_interval\[1\]` must lie in \[0, 1\]",
    ),
    "one number": (
        {"guidance_interval": 0.5},
        TypeError,
        r"`guidance_interval` must be \(start, end\), got 0.5",
    ),
    "text": ({"guidance_interval": ("a", "b")}, TypeError, r"`guidance_interval\[0\]` must be a number"),
    "rescale": ({"guidance_rescale": 1.5}, ValueError, r"`guidance_rescale` must lie in \[0, 1\], got 1.5"),
    "guider": ({"guider": "apg"}, TypeError, "`guider` must be a guider of diffusers, got str"),
    "guider of more predictions": (
        {"guider": SkipLayerGuidance(skip_layer_guidance_layers=[0])},
        ValueError,
        "SkipLayerGuidance needs the predictions",
    ),
    "both": (
        {"guider": AdaptiveProjectedGuidance(), "guidance_rescale": 0.5},
        ValueError,
        "do not go with `guider`",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(pipe: GSPN2Pipeline, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        latents_of(pipe, **options)
