"""callback_on_step_end: what it sees, what it may change, and how it stops a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

STEPS = 4


def latents_of(pipe: GSPN2Pipeline, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator, **options}
    return pipe("a red apple", **settings).images


def test_sees_every_step_and_the_tensors_it_asked_for(pipe: GSPN2Pipeline) -> None:
    seen = []

    def callback(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipeline is pipe
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        assert tensors["latents"].shape == (1, 4, 8, 8)
        assert tensors["prompt_embeds"].shape == tensors["negative_prompt_embeds"].shape
        seen.append((step, round(float(timestep))))
        return {}

    result = latents_of(
        pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs
    )
    assert seen == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert pipe.num_timesteps == STEPS
    assert torch.equal(result, latents_of(pipe))


def test_changes_latents(pipe: GSPN2Pipeline) -> None:
    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert latents_of(pipe, callback_on_step_end=callback).abs().sum() == 0


def test_changes_embeddings(pipe: GSPN2Pipeline) -> None:
    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    changed = latents_of(
        pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert (changed - latents_of(pipe)).abs().max() > 0.01


def test_raises_guidance(pipe: GSPN2Pipeline) -> None:
    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale += 1.0
        return tensors

    changed = latents_of(pipe, guidance_scale=2.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + STEPS
    assert (changed - latents_of(pipe, guidance_scale=2.0)).abs().max() > 0.01
    with pytest.raises(ValueError, match="guidance_scale"):
        latents_of(pipe, guidance_scale=1.0, callback_on_step_end=callback)


def test_diffusers_own_callback_ends_guidance(pipe: GSPN2Pipeline) -> None:
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    latents_of(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert rows == [2, 2, 2, 1]


def test_interrupt_stops_after_the_step_and_is_forgotten_by_the_next_call(pipe: GSPN2Pipeline) -> None:
    trail = []

    def record(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        trail.append(tensors["latents"])
        return tensors

    def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return tensors

    final = latents_of(pipe, callback_on_step_end=record)
    assert torch.equal(latents_of(pipe, callback_on_step_end=stop), trail[1])
    assert torch.equal(latents_of(pipe), final)
