"""The call: against a sampler written out by hand, seeds, batches, guidance, embeddings, output types."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import SanaPipeline
from tiny_models import MAX_TOKENS, TEXT_CHANNELS, build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput

PROMPT = "a red apple, flat style"
STEPS = 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: GSPN2Pipeline, prompt: Any = PROMPT, **options: Any) -> np.ndarray:
    settings = {"generator": seeded(0), "num_inference_steps": STEPS, "output_type": "np", **options}
    return pipe(prompt, **settings).images


@torch.no_grad()
def draw_by_hand(
    pipe: GSPN2Pipeline, prompt: str, negative: str, noise: torch.Tensor, guidance: float
) -> np.ndarray:
    """Euler steps from sigma 1 to 0, guidance and decoding written out, one denoiser call per prompt."""
    conditions = []
    for text in (negative, prompt):
        tokens = pipe.tokenizer(text, return_tensors="pt")  # no padding: it must not matter
        hidden = pipe.text_encoder(**tokens).last_hidden_state
        conditions.append((hidden, hidden.mean(dim=1)))
    latents, sigmas = noise, [1 - step / STEPS for step in range(STEPS + 1)]
    for sigma, following in pairwise(sigmas):
        velocities = [
            pipe.transformer(
                latents, torch.tensor([1000 * sigma]), encoder_hidden_states=hidden, pooled_projections=pooled
            ).sample
            for hidden, pooled in conditions
        ]
        velocity = velocities[0] + guidance * (velocities[1] - velocities[0])
        latents = latents + (following - sigma) * velocity
    picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    return (picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_equals_a_sampler_written_by_hand(pipe: GSPN2Pipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1))
    expected = draw_by_hand(pipe, PROMPT, "blue", noise, guidance=3.0)
    picture = draw(pipe, negative_prompt="blue", latents=noise, guidance_scale=3.0)
    assert picture.std() > 0.05
    np.testing.assert_allclose(picture, expected, atol=2e-5)


def test_call_has_the_arguments_of_sana() -> None:
    ours = inspect.signature(GSPN2Pipeline.__call__).parameters
    not_ours = {"eta", "clean_caption", "use_resolution_binning", "complex_human_instruction"}
    assert set(inspect.signature(SanaPipeline.__call__).parameters) - set(ours) == not_ours


def test_same_seed_same_picture_other_seed_other_picture(pipe: GSPN2Pipeline) -> None:
    first = draw(pipe)
    np.testing.assert_array_equal(first, draw(pipe))
    assert np.abs(first - draw(pipe, generator=seeded(1))).max() > 0.05


def test_prompt_negative_prompt_and_guidance_reach_the_picture(pipe: GSPN2Pipeline) -> None:
    first = draw(pipe)
    for options in (
        {"prompt": "a blue rocket"},
        {"negative_prompt": "a blue rocket"},
        {"guidance_scale": 2.0},
    ):
        assert np.abs(first - draw(pipe, **options)).max() > 0.01, options


def test_each_picture_of_a_batch_equals_it_alone(pipe: GSPN2Pipeline) -> None:
    prompts, negatives = [PROMPT, "a rocket"], ["", "blue"]
    generators = [seeded(seed) for seed in range(4)]
    together = draw(pipe, prompts, negative_prompt=negatives, num_images_per_prompt=2, generator=generators)
    assert together.shape == (4, 16, 16, 3)
    for index in range(4):
        text, negative = prompts[index // 2], negatives[index // 2]
        alone = draw(pipe, text, negative_prompt=negative, generator=seeded(index))
        np.testing.assert_allclose(together[index], alone[0], atol=2e-5)


def test_one_generator_serves_all_pictures(pipe: GSPN2Pipeline) -> None:
    pictures = draw(pipe, num_images_per_prompt=2)
    assert np.abs(pictures[0] - pictures[1]).max() > 0.05
    np.testing.assert_array_equal(pictures, draw(pipe, num_images_per_prompt=2))


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (0.0, 1), (4.0, 2)])
def test_guidance_doubles_the_denoiser_batch_only_above_one(
    pipe: GSPN2Pipeline, guidance: float, rows: int
) -> None:
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    draw(pipe, guidance_scale=guidance)
    assert seen == [rows] * STEPS


def test_empty_prompt_is_the_default_negative(pipe: GSPN2Pipeline) -> None:
    np.testing.assert_array_equal(draw(pipe), draw(pipe, negative_prompt=None))
    np.testing.assert_array_equal(draw(pipe), draw(pipe, negative_prompt=""))
    # Guidance leads nowhere when both sides are the empty prompt.
    unguided = draw(pipe, "", guidance_scale=1.0)
    np.testing.assert_allclose(draw(pipe, "", guidance_scale=7.0), unguided, atol=1e-4)


def test_embeddings_out_and_in_give_the_same_picture(pipe: GSPN2Pipeline) -> None:
    embeds, mask, negative, negative_mask, pooled, negative_pooled = pipe.encode_prompt([PROMPT, "a rocket"])
    assert embeds.shape == negative.shape == (2, MAX_TOKENS, TEXT_CHANNELS)
    assert mask.shape == negative_mask.shape == (2, MAX_TOKENS)
    assert pooled.shape == negative_pooled.shape == (2, TEXT_CHANNELS)
    given = {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
    }
    expected = draw(pipe, [PROMPT, "a rocket"])
    pipe.text_encoder = pipe.tokenizer = None
    np.testing.assert_allclose(draw(pipe, None, **given), expected, atol=2e-5)
    other = draw(
        pipe, None, **given, pooled_prompt_embeds=-pooled, negative_pooled_prompt_embeds=negative_pooled
    )
    assert np.abs(other - expected).max() > 0.01


def test_masked_tokens_and_lengths_of_embeddings_do_not_matter(pipe: GSPN2Pipeline) -> None:
    embeds, mask, *_ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    kept = int(mask.sum())
    assert kept < MAX_TOKENS
    noisy = torch.where(mask[..., None] == 1, embeds, torch.randn(embeds.shape, generator=seeded(5)))
    expected = draw(pipe)
    np.testing.assert_allclose(
        draw(pipe, None, prompt_embeds=noisy, prompt_attention_mask=mask.bool()), expected, atol=2e-5
    )
    cut = draw(pipe, None, prompt_embeds=embeds[:, :kept], prompt_attention_mask=mask[:, :kept])
    np.testing.assert_allclose(cut, expected, atol=2e-5)


def test_output_types(pipe: GSPN2Pipeline) -> None:
    array = draw(pipe, num_images_per_prompt=2)
    assert array.shape == (2, 16, 16, 3)
    assert array.dtype == np.float32
    tensor = draw(pipe, num_images_per_prompt=2, output_type="pt")
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    pictures = draw(pipe, num_images_per_prompt=2, output_type="pil")
    assert [(picture.size, picture.mode) for picture in pictures] == [((16, 16), "RGB")] * 2
    assert isinstance(pictures[0], PIL.Image.Image)
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    latents = draw(pipe, num_images_per_prompt=2, output_type="latent")
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), torch.float32)
    with torch.no_grad():
        np.testing.assert_array_equal(pipe.decode_latents(latents, "np"), array)


def test_return_dict(pipe: GSPN2Pipeline) -> None:
    options = {"generator": seeded(0), "num_inference_steps": 1}
    assert isinstance(pipe(PROMPT, **options), GSPN2PipelineOutput)
    plain = pipe(PROMPT, return_dict=False, **options)
    assert isinstance(plain, tuple)
    assert len(plain) == 1


@pytest.mark.parametrize(("height", "width"), [(8, 24), (28, 4)])
def test_sizes_that_are_not_square(pipe: GSPN2Pipeline, height: int, width: int) -> None:
    noise = torch.randn(1, 4, height // 2, width // 2, generator=seeded(1))
    picture = draw(pipe, height=height, width=width, latents=noise)
    assert picture.shape == (1, height, width, 3)
    np.testing.assert_allclose(picture, draw_by_hand(pipe, PROMPT, "", noise, guidance=4.0), atol=2e-5)


def test_bfloat16_is_close_to_float32(pipe: GSPN2Pipeline) -> None:
    expected = draw(pipe)
    picture = draw(pipe.to(dtype=torch.bfloat16))
    assert picture.dtype == np.float32
    assert 0 < np.abs(picture - expected).mean() < 0.03


def test_without_pooled_text() -> None:
    pipe = build_tiny_pipeline(pooled_projection_dim=None)
    pipe.set_progress_bar_config(disable=True)
    assert np.abs(draw(pipe) - draw(pipe, "a blue rocket")).max() > 0.001


def test_given_latents_are_left_alone_and_any_float_dtype(pipe: GSPN2Pipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1))
    before = noise.clone()
    picture = draw(pipe, latents=noise)
    assert torch.equal(noise, before)
    np.testing.assert_allclose(draw(pipe, latents=noise.double()), picture, atol=1e-6)


def test_progress_bar_counts_the_steps(pipe: GSPN2Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert f"{STEPS}/{STEPS}" in capfd.readouterr().err


@pytest.mark.gpu
def test_cuda_and_cpu_give_the_same_picture(pipe: GSPN2Pipeline) -> None:
    expected = draw(pipe, num_inference_steps=10)  # a CPU generator: the same noise on both
    np.testing.assert_allclose(draw(pipe.to("cuda"), num_inference_steps=10), expected, atol=2e-3)
