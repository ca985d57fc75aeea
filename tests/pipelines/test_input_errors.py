"""Bad input: an error that names the argument, before the text encoder or the denoiser has run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MAX_TOKENS, TEXT_CHANNELS, build_tiny_pipeline, tiny_vae

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

EMBEDS = torch.zeros(2, 5, TEXT_CHANNELS)
MASK = torch.ones(2, 5)
GENERATOR = torch.Generator()


@pytest.fixture(scope="module")
def guarded() -> GSPN2Pipeline:
    """A pipeline whose models fail when they run."""
    pipeline = build_tiny_pipeline()

    def forbid(module: torch.nn.Module, inputs: Any) -> None:
        raise AssertionError(f"{type(module).__name__} ran before the check")

    pipeline.text_encoder.register_forward_pre_hook(forbid)
    pipeline.transformer.register_forward_pre_hook(forbid)
    return pipeline


def embeds(**options: Any) -> dict[str, Any]:
    return {"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK, **options}


VALUE_ERRORS = {
    "no prompt": ({"prompt": None}, "`prompt`.*`prompt_embeds`.*neither"),
    "prompt and embeds": (embeds(prompt="a"), "`prompt`.*`prompt_embeds`.*both"),
    "empty list": ({"prompt": []}, "`prompt` is an empty list"),
    "empty negative list": ({"negative_prompt": []}, "`negative_prompt` is an empty list"),
    "too many negatives": (
        {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3},
        "2 prompts.*3 of `negative_",
    ),
    "list of negatives and embeds": (
        embeds(negative_prompt=["a", "a"], negative_prompt_embeds=EMBEDS),
        "`negative_prompt_embeds`, got both",
    ),
    "negative embeds of another number": (
        {"negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": MASK},
        "1 prompts.*2 of `negative_prompt_embeds`",
    ),
    "embeds not 3-d": (embeds(prompt_embeds=EMBEDS[0]), r"`prompt_embeds` must have the shape .*\(5, 16\)"),
    "embeds too wide": (embeds(prompt_embeds=torch.zeros(2, 5, 7)), "16 channels.*got 7"),
    "embeds without mask": (embeds(prompt_attention_mask=None), "without `prompt_attention_mask`"),
    "mask without embeds": (
        {"prompt_attention_mask": MASK},
        "`prompt_attention_mask` came without `prompt_embeds`",
    ),
    "pooled without embeds": ({"pooled_prompt_embeds": EMBEDS[:, 0]}, "`pooled_prompt_embeds` came without"),
    "mask of wrong shape": (embeds(prompt_attention_mask=MASK[:1]), r"mask` must have the shape \(2, 5\)"),
    "pooled of wrong shape": (
        embeds(pooled_prompt_embeds=torch.zeros(2, 3)),
        r"`pooled_prompt_embeds` must have the shape \(2, 16\), got \(2, 3\)",
    ),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
    "negative steps": ({"num_inference_steps": -3}, "`num_inference_steps` must be at least 1, got -3"),
    "no images": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
    "height": ({"height": 18}, "`height` must be a multiple of 4 .*got 18; nearest allowed: 16 or 20"),
    "width": ({"width": 3}, "`width` must be a multiple of 4 .*got 3; nearest allowed: 4$"),
    "width 0": ({"width": 0}, "`width` must be at least 1, got 0"),
    "latents": ({"latents": torch.zeros(1, 4, 8, 9)}, r"\(1, 4, 8, 8\) for this call, got \(1, 4, 8, 9\)"),
    "latents of one picture": (
        {"latents": torch.zeros(1, 4, 8, 8), "num_images_per_prompt": 2},
        r"`latents` must have the shape \(2, 4, 8, 8\)",
    ),
    "generators": ({"prompt": ["a", "b"], "generator": [GENERATOR]}, "2 pictures.*1 generators"),
    "output type": ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpg'"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"must be among .*\['noise'\]"),
    "timesteps and sigmas": ({"timesteps": [9], "sigmas": [0.5]}, "`timesteps` and `sigmas`, got both"),
    "no sigmas": ({"sigmas": []}, "`sigmas` is empty"),
    "sigmas ascending": ({"sigmas": [0.5, 0.9]}, "`sigmas` must be strictly descending"),
    "sigmas too large": ({"sigmas": [2.0, 0.9]}, r"`sigmas` must lie in \(0, 1\]"),
    "guidance nan": ({"guidance_scale": float("nan")}, "`guidance_scale` must be finite"),
    "no room for text": ({"max_sequence_length": 2}, "`max_sequence_length` must be at least 3, got 2"),
    "too long": ({"max_sequence_length": 99}, f"`max_sequence_length` must be at most {MAX_TOKENS}.*got 99"),
}

TYPE_ERRORS = {
    "prompt": ({"prompt": 3}, "`prompt` must be a string or a list of strings, got int"),
    "prompt entry": ({"prompt": ["a", None]}, r"`prompt\[1\]` must be a string, got NoneType"),
    "negative": ({"negative_prompt": 1.5}, "`negative_prompt` must be a string.*got float"),
    "embeds": (embeds(prompt_embeds=[1.0]), "`prompt_embeds` must be a torch.Tensor, got list"),
    "integer embeds": (
        embeds(prompt_embeds=EMBEDS.long()),
        "`prompt_embeds` must have a floating-point dtype",
    ),
    "mask": (embeds(prompt_attention_mask=[1]), "`prompt_attention_mask` must be a torch.Tensor, got list"),
    "steps": ({"num_inference_steps": 2.5}, "`num_inference_steps` must be an integer, got float"),
    "steps bool": ({"num_inference_steps": True}, "`num_inference_steps` must be an integer, got bool"),
    "height": ({"height": "16"}, "`height` must be an integer, got str"),
    "guidance": ({"guidance_scale": "4"}, "`guidance_scale` must be a number, got str"),
    "generator": ({"generator": 3}, "`generator` must be a torch.Generator, got int"),
    "generator entry": ({"generator": [3]}, r"`generator\[0\]` must be a torch.Generator, got int"),
    "latents": ({"latents": [0]}, "`latents` must be a torch.Tensor, got list"),
    "integer latents": ({"latents": torch.zeros(1, 4, 8, 8).int()}, "`latents` must have a floating-point"),
    "sigmas": ({"sigmas": 0.5}, "`sigmas` must be a list of numbers, got float"),
    "sigmas entry": ({"sigmas": [1.0, "a"]}, r"`sigmas\[1\]` must be a number, got str"),
    "callback": ({"callback_on_step_end": 1}, "`callback_on_step_end` must be callable, got int"),
    "callback tensors": (
        {"callback_on_step_end_tensor_inputs": "latents"},
        "must be a list of names, got str",
    ),
}


@pytest.mark.parametrize(("options", "message"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(guarded: GSPN2Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guarded(**{"prompt": "a", **options})


@pytest.mark.parametrize(("options", "message"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(guarded: GSPN2Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        guarded(**{"prompt": "a", **options})


def test_components_that_do_not_fit(pipe: GSPN2Pipeline) -> None:
    pipe.vae = tiny_vae(latent_channels=3)
    with pytest.raises(ValueError, match="`vae` has 3 latent channels, `transformer` expects 4"):
        pipe("a")
    pipe.vae = None
    with pytest.raises(ValueError, match="no `vae`"):
        pipe("a")


def test_vae_of_another_scale(pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    message = "`vae` makes latents 4 times smaller than pictures, `transformer` was trained on 2"
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    other = tiny_vae(block_out_channels=(8, 8, 8), **kinds)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae_scale_factor"] == 2
    with pytest.raises(ValueError, match=message):
        GSPN2Pipeline.from_pretrained(tmp_path, vae=other)
    with pytest.raises(ValueError, match=message):
        GSPN2Pipeline.from_pipe(pipe, vae=other)
    pipe.vae = other
    with pytest.raises(ValueError, match=message):
        pipe("a")


def test_prompt_without_text_encoder(pipe: GSPN2Pipeline) -> None:
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="`text_encoder`"):
        pipe("a")
    with pytest.raises(ValueError, match="`negative_prompt_embeds`"):
        pipe(**embeds())


def test_text_encoder_with_a_head(pipe: GSPN2Pipeline) -> None:
    from transformers import BertForMaskedLM

    pipe.text_encoder = BertForMaskedLM(pipe.text_encoder.config)
    with pytest.raises(TypeError, match="`text_encoder` must return last_hidden_state, BertForMaskedLM"):
        pipe("a")
