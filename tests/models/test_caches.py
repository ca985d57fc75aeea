"""Feature caches: what diffusers' suites check, which layers are hooked, and caches that cannot apply."""

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
from diffusers.hooks import MagCacheConfig, SeaCacheConfig, TextKVCacheConfig
from tiny_denoiser import make_inputs, make_model

from gspn2_diffusion import GSPN2Transformer2DModel


def now() -> int:
    return 500


def faster(**options: Any) -> FasterCacheConfig:
    settings = {
        "spatial_attention_timestep_skip_range": (-1, 901),
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": (-1, 901),
        "tensor_format": "BCHW",
        "current_timestep_callback": now,
    }
    return FasterCacheConfig(**{**settings, **options})


SPATIAL = {"spatial_attention_block_skip_range": 2, "current_timestep_callback": now}
CROSS = {"cross_attention_block_skip_range": 2, "current_timestep_callback": now}
TAYLOR = {"cache_interval": 3, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32}
# Each with the layers below the root that it must hook in a model of three gspn2 layers.
CACHES: dict[str, tuple[Any, list[str]]] = {
    "first block": (lambda: FirstBlockCacheConfig(threshold=10.0), ["blocks"]),
    "mag": (
        lambda: MagCacheConfig(
            num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]
        ),
        ["blocks"],
    ),
    "taylor seer": (lambda: TaylorSeerCacheConfig(**TAYLOR), ["mixer", "cross_attn"]),
    "taylor seer lite": (lambda: TaylorSeerCacheConfig(**TAYLOR, use_lite_mode=True), ["blocks", "proj_out"]),
    "broadcast": (lambda: PyramidAttentionBroadcastConfig(**SPATIAL), ["mixer"]),
    "broadcast across": (lambda: PyramidAttentionBroadcastConfig(**CROSS), ["cross_attn"]),
    "broadcast both": (
        lambda: PyramidAttentionBroadcastConfig(**{**SPATIAL, **CROSS}),
        ["mixer", "cross_attn"],
    ),
    "faster": (faster, ["mixer"]),
}


def later(step: int) -> dict[str, Any]:
    inputs = make_inputs()
    return {**inputs, "hidden_states": inputs["hidden_states"] + 0.3 * step}


@torch.no_grad()
def run(model: GSPN2Transformer2DModel, steps: int = 2, context: str = "step") -> list[torch.Tensor]:
    with model.cache_context(context):
        return [model(**later(step)).sample for step in range(steps)]


def hooked(model: GSPN2Transformer2DModel) -> set[str]:
    """Names of the layers, short of the root, that hold a hook."""
    return {
        name
        for name, module in model.named_modules()
        if name and getattr(module, "_diffusers_hook", None) is not None and module._diffusers_hook.hooks
    }


def expected_layers(parts: list[str], layers: int) -> set[str]:
    names = set()
    for part in parts:
        ending = "" if part == "blocks" else f".{part}"
        names |= {part} if part == "proj_out" else {f"transformer_blocks.{i}{ending}" for i in range(layers)}
    return names


@pytest.mark.parametrize(("make", "parts"), CACHES.values(), ids=CACHES)
def test_cache_is_used_and_can_be_taken_away(make: Any, parts: list[str]) -> None:
    model, plain = make_model(num_layers=3), run(make_model(num_layers=3), steps=3)
    assert not model.is_cache_enabled
    model.enable_cache(make())
    assert model.is_cache_enabled
    assert hooked(model) == expected_layers(parts, 3)
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        model.enable_cache(make())
    first = run(model)
    torch.testing.assert_close(first[0], plain[0])
    assert first[1].isfinite().all()
    assert (first[1] - plain[1]).abs().max() > 1e-3  # approximated: something was not computed again
    model._reset_stateful_cache()
    again = run(model)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    model.disable_cache()
    assert not model.is_cache_enabled
    assert hooked(model) == set()
    for a, b in zip(run(model, steps=3), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["first block", "mag", "taylor seer"])
def test_contexts_have_their_own_features(name: str) -> None:
    model = make_model(num_layers=3)
    model.enable_cache(CACHES[name][0]())
    first = run(model, context="cond")
    second = run(model, context="uncond")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "skipped"),
    [("first block", ["1", "2"]), ("mag", ["0", "1", "2"]), ("broadcast", ["0", "1", "2"])],
)
def test_caches_save_mixers(name: str, skipped: list[str]) -> None:
    model, calls = make_model(num_layers=3), []
    for index, block in enumerate(model.transformer_blocks):
        block.mixer.to_proxy.register_forward_hook(lambda *_, index=index: calls.append(str(index)))
    model.enable_cache(CACHES[name][0]())
    run(model)
    assert calls == ["0", "1", "2", *sorted({"0", "1", "2"} - set(skipped))]


@pytest.mark.parametrize("mixer", ["softmax", "linear"])
@pytest.mark.parametrize("name", ["broadcast", "faster", "taylor seer"])
def test_caches_of_attention_find_the_other_mixers(name: str, mixer: str) -> None:
    make, parts = CACHES[name]
    model = make_model(mixer=[mixer, "gspn2"])
    model.enable_cache(make())
    assert hooked(model) == expected_layers(parts, 2)
    assert all(sample.isfinite().all() for sample in run(model))


def test_faster_cache_without_pooled_text() -> None:
    model = make_model(pooled_projection_dim=None)
    model.enable_cache(faster())
    inputs = make_inputs(pooled=False)
    with torch.no_grad(), model.cache_context("step"):
        assert all(model(**inputs).sample.isfinite().all() for _ in range(3))


NOT_APPLICABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "videos": (
        SeaCacheConfig(),
        {},
        "SeaCacheConfig cannot apply .*video; allowed are FirstBlockCacheConfig",
    ),
    "another model": (TextKVCacheConfig(), {}, "TextKVCacheConfig cannot apply .*one other model"),
    "frames": (faster(tensor_format="BCFHW"), {}, "tensor_format must be 'BCHW' .* got 'BCFHW'"),
    "no timestep": (faster(current_timestep_callback=None), {}, "current_timestep_callback is needed"),
    "one block": (FirstBlockCacheConfig(), {"num_layers": 1}, "skips all blocks but the first; .* only one"),
    "no mixer": (
        PyramidAttentionBroadcastConfig(**SPATIAL),
        {"mixer": "none"},
        r"finds nothing to cache in this GSPN2Transformer2DModel of the mixers \['none'\]",
    ),
    "no time axis": (
        PyramidAttentionBroadcastConfig(temporal_attention_block_skip_range=2, current_timestep_callback=now),
        {},
        "finds nothing to cache",
    ),
    "no such layer": (TaylorSeerCacheConfig(cache_identifiers=["up_blocks"]), {}, "finds nothing to cache"),
    "unknown": ({"threshold": 1}, {}, "is not supported"),
}


@pytest.mark.parametrize(("config", "options", "message"), NOT_APPLICABLE.values(), ids=NOT_APPLICABLE)
def test_caches_that_cannot_apply_raise(config: Any, options: dict[str, Any], message: str) -> None:
    model = make_model(**options)
    with pytest.raises(ValueError, match=message):
        model.enable_cache(config)
    assert not model.is_cache_enabled
    assert hooked(model) == set()
    model.enable_cache(PyramidAttentionBroadcastConfig(**CROSS))  # a fitting one still goes in
    assert model.is_cache_enabled
