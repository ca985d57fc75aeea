"""Feature caches through whole pipelines, with guidance of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.hooks import MagCacheConfig
from three_pipelines import CASES, Case

STEPS = 4


def broadcast(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: Any, **options: Any) -> FasterCacheConfig:
    settings = {
        "spatial_attention_timestep_skip_range": (-1, 901),
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": (-1, 901),
        "attention_weight_callback": lambda _: 0.5,
        "tensor_format": "BCHW",
        "current_timestep_callback": lambda: pipe.current_timestep,
    }
    return FasterCacheConfig(**{**settings, **options})


CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=STEPS, threshold=10.0, mag_ratios=[1.0] * STEPS),
    "taylor seer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "broadcast": broadcast,
    "faster": faster,
}


def run(case: Case, pipe: Any, **options: Any) -> torch.Tensor:
    return case.run(pipe, **{"num_inference_steps": STEPS, "output_type": "latent", **options})


OF_OTHER_TASKS = [("first block", "image"), ("first block", "inpaint")]


@pytest.mark.parametrize(("name", "kind"), [*((name, "text") for name in CACHES), *OF_OTHER_TASKS])
def test_cached_pictures(name: str, kind: str) -> None:
    case = CASES[kind]
    pipe = case.build(num_layers=3)
    expected = run(case, pipe)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    cached = run(case, pipe)
    assert cached.isfinite().all()
    assert (cached - expected).abs().max() > 1e-4  # something was reused
    assert torch.equal(run(case, pipe), cached)  # and forgotten when the call ended
    pipe.transformer.disable_cache()
    assert torch.equal(run(case, pipe), expected)


@pytest.mark.parametrize("name", ["first block", "mag", "taylor seer", "broadcast"])
def test_guidance_may_go_on_and_off(name: str) -> None:
    case = CASES["text"]
    pipe = case.build(num_layers=3)
    pipe.transformer.enable_cache(CACHES[name](pipe))
    for options in ({"guidance_interval": (0.25, 0.75)}, {"guidance_scale": 1.0}):
        assert run(case, pipe, **options).isfinite().all()


def test_guiders_keep_their_predictions_apart() -> None:
    """With a cache that reuses everything after the first step, each prediction is the first of its kind."""
    case, contexts = CASES["text"], []
    pipe = case.build(num_layers=3)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))  # nothing is alike enough
    expected = run(case, case.build(num_layers=3), guider=AdaptiveProjectedGuidance())
    open_context = pipe.transformer.cache_context

    def context(name: str) -> Any:
        contexts.append(name)
        return open_context(name)

    pipe.transformer.cache_context = context
    drawn = run(case, pipe, guider=AdaptiveProjectedGuidance())
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    assert contexts == ["pred_cond", "pred_uncond"] * STEPS


def test_features_of_a_stopped_call_are_forgotten() -> None:
    case = CASES["text"]
    pipe = case.build(num_layers=3)
    pipe.transformer.enable_cache(CACHES["first block"](pipe))
    expected = run(case, pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(case, pipe, prompt="a rocket", callback_on_step_end=fail)
    assert torch.equal(run(case, pipe), expected)


def test_what_does_not_go_together_raises_before_any_work() -> None:
    case = CASES["text"]
    pipe = case.build()
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("ran before the check"))
    pipe.transformer.enable_cache(broadcast(pipe))
    with pytest.raises(ValueError, match="PyramidAttentionBroadcastConfig does not go with `guider`"):
        run(case, pipe, guider=AdaptiveProjectedGuidance())
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(faster(pipe))
    for options in ({"guidance_scale": 1.0}, {"guidance_interval": (0.0, 0.5)}):
        with pytest.raises(ValueError, match="needs guidance in every step, got `guidance_scale`"):
            run(case, pipe, **options)


def test_faster_cache_of_a_distilled_model_needs_no_guidance() -> None:
    case = CASES["text"]
    pipe = case.build()
    pipe.transformer.enable_cache(faster(pipe, is_guidance_distilled=True))
    assert run(case, pipe, guidance_scale=1.0).isfinite().all()
