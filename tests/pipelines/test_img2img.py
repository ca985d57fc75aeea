"""GSPN2Img2ImgPipeline: strength, against a sampler written out by hand, inputs, seeds, solvers, errors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from tiny_models import build_tiny_pipeline, tiny_vae

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline

PROMPT = "a red apple"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe() -> GSPN2Img2ImgPipeline:
    pipeline = GSPN2Img2ImgPipeline.from_pipe(build_tiny_pipeline())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=seeded(11))


def as_pil(pictures: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray((pictures[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def draw(pipe: GSPN2Img2ImgPipeline, image: Any, **options: Any) -> torch.Tensor:
    settings = {"generator": seeded(0), "num_inference_steps": 5, "output_type": "pt", **options}
    return pipe(settings.pop("prompt", PROMPT), image=image, **settings).images


@torch.no_grad()
def test_equals_a_sampler_written_by_hand(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1))
    config = pipe.vae.config
    mean = pipe.vae.encode(2 * picture - 1).latent_dist.mean
    clean = (mean - config.shift_factor) * config.scaling_factor
    tokens = pipe.tokenizer(PROMPT, return_tensors="pt")
    hidden = pipe.text_encoder(**tokens).last_hidden_state
    latents = 0.4 * clean + 0.6 * noise
    for sigma, following in pairwise([0.6, 0.4, 0.2, 0.0]):  # the last three of five steps
        velocity = pipe.transformer(
            latents,
            torch.tensor([1000 * sigma]),
            encoder_hidden_states=hidden,
            pooled_projections=hidden.mean(dim=1),
        ).sample
        latents = latents + (following - sigma) * velocity
    expected = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    drawn = draw(pipe, picture, strength=0.6, guidance_scale=1.0, latents=noise)
    torch.testing.assert_close(drawn, (expected / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=0)
    assert pipe.num_timesteps == 3


@torch.no_grad()
def test_strength(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    through = (pipe.vae.decode(pipe.vae.encode(2 * picture - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(
        0, 1
    )
    torch.testing.assert_close(draw(pipe, picture, strength=0), through, atol=1e-5, rtol=0)
    assert pipe.num_timesteps == 0
    from_text = GSPN2Pipeline.from_pipe(pipe)(
        PROMPT, generator=seeded(0), num_inference_steps=5, output_type="pt"
    ).images
    torch.testing.assert_close(draw(pipe, picture, strength=1), from_text, atol=1e-5, rtol=0)
    distances = [(draw(pipe, picture, strength=s) - through).abs().mean() for s in (0.2, 1.0)]
    assert 0 < distances[0] < distances[1]


def test_all_kinds_of_pictures_are_the_same(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    pil = as_pil(picture)
    array = np.asarray(pil, dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = draw(pipe, pil)
    for image in ([pil], array, array[None], [array], tensor, tensor[None], [tensor], pil.convert("RGBA")):
        torch.testing.assert_close(draw(pipe, image), expected, atol=1e-5, rtol=0)
    latents = pipe.encode_pictures(2 * tensor[None] - 1, torch.device("cpu")).detach()
    torch.testing.assert_close(draw(pipe, latents), expected, atol=1e-4, rtol=0)


def test_transparent_becomes_white(pipe: GSPN2Img2ImgPipeline) -> None:
    clear = PIL.Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    expected = draw(pipe, PIL.Image.new("RGB", (16, 16), "white"))
    torch.testing.assert_close(draw(pipe, clear), expected)


def test_sizes(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    wide = as_pil(picture).resize((24, 12))
    assert draw(pipe, wide).shape == (1, 3, 12, 24)
    assert draw(pipe, as_pil(picture).resize((17, 15)), height=16, width=20).shape == (1, 3, 16, 20)


def test_seeds_and_batches(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    other = picture.flip(-1)
    first = draw(pipe, picture)
    assert torch.equal(first, draw(pipe, picture))
    assert (first - draw(pipe, picture, generator=seeded(1))).abs().max() > 0.01
    together = draw(
        pipe,
        torch.cat([picture, other]),
        prompt=[PROMPT, "a rocket"],
        num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
    )
    for index in range(4):
        alone = draw(
            pipe,
            (picture, other)[index // 2],
            prompt=(PROMPT, "a rocket")[index // 2],
            generator=seeded(index),
        )
        torch.testing.assert_close(together[index : index + 1], alone, atol=2e-5, rtol=0)
    shared = draw(pipe, picture, prompt=[PROMPT, "a rocket"], generator=[seeded(0), seeded(3)])
    torch.testing.assert_close(shared[:1], first, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=["heun", "unipc"],
)
def test_other_solvers_reach_the_same_end(picture: torch.Tensor, scheduler: Any) -> None:
    pipe = GSPN2Img2ImgPipeline.from_pipe(build_tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    options = {"strength": 0.5, "output_type": "latent", "guidance_scale": 1.5}
    end = draw(pipe, picture, num_inference_steps=80, **options)
    pipe.scheduler = scheduler
    other = draw(pipe, picture, num_inference_steps=20, **options)
    assert (other - end).norm() < 0.1 * end.norm()


def test_callback_sees_the_steps_that_run(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    seen = []

    def callback(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, round(float(timestep))))
        pipeline._interrupt = step == 1
        return tensors

    draw(pipe, picture, strength=0.6, callback_on_step_end=callback)
    assert seen == [(0, 600), (1, 400)]


def test_output_types(pipe: GSPN2Img2ImgPipeline, picture: torch.Tensor) -> None:
    tensor = draw(pipe, picture)
    np.testing.assert_array_equal(
        draw(pipe, picture, output_type="np")[0], tensor[0].permute(1, 2, 0).numpy()
    )
    assert draw(pipe, picture, output_type="pil")[0].size == (16, 16)
    assert draw(pipe, picture, output_type="latent").shape == (1, 4, 8, 8)
    assert isinstance(pipe(PROMPT, image=picture, num_inference_steps=1, return_dict=False), tuple)


def test_from_pipe_shares_components_both_ways() -> None:
    text = build_tiny_pipeline()
    image = GSPN2Img2ImgPipeline.from_pipe(text)
    back = GSPN2Pipeline.from_pipe(image)
    for name, part in text.components.items():
        assert image.components[name] is part
        assert back.components[name] is part
    assert image.config["max_sequence_length"] == back.config["max_sequence_length"] == 12


PICTURE = torch.zeros(1, 3, 16, 16)
ERRORS = {
    "no image": ({"image": None}, ValueError, "`image` is needed"),
    "strength": ({"strength": 1.5}, ValueError, r"`strength` must lie in \[0, 1\], got 1.5"),
    "negative": ({"strength": -0.1}, ValueError, r"`strength` must lie in \[0, 1\], got -0.1"),
    "strength type": ({"strength": "1"}, TypeError, "`strength` must be a number, got str"),
    "odd size": (
        {"image": PIL.Image.new("RGB", (18, 16))},
        ValueError,
        r"`image\.width` must be a multiple of 4",
    ),
    "odd height": ({"height": 15}, ValueError, "`height` must be a multiple of 4"),
    "type": ({"image": "apple.png"}, TypeError, "`image` must be PIL pictures.*'apple.png'"),
    "two dimensions": ({"image": torch.zeros(16, 16)}, TypeError, r"got Tensor of shape \(16, 16\)"),
    "bytes": ({"image": torch.zeros(1, 3, 16, 16).byte()}, TypeError, "floats .*got torch.uint8"),
    "range": ({"image": PICTURE - 1}, ValueError, r"`image` must lie in \[0, 1\], got \[-1.0, -1.0\]"),
    "nan": ({"image": PICTURE * float("nan")}, ValueError, r"`image` must lie in \[0, 1\]"),
    "channels": ({"image": torch.zeros(1, 1, 16, 16)}, ValueError, "`image` must have 3 channels, got 1"),
    "count": ({"image": torch.zeros(3, 3, 16, 16)}, ValueError, "1 prompts came with 3"),
    "latents": ({"latents": torch.zeros(1, 4, 8, 9)}, ValueError, "`latents` must have the shape"),
    "mixed": ({"image": [PICTURE[0], np.zeros((16, 16, 3))]}, TypeError, r"`image\[1\]`.*got ndarray"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(pipe: GSPN2Img2ImgPipeline, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pipe("a", **{"image": PICTURE, **options})


def test_vae_that_does_not_fit() -> None:
    pipe = GSPN2Img2ImgPipeline.from_pipe(build_tiny_pipeline())
    pipe.vae = tiny_vae(latent_channels=3)
    with pytest.raises(ValueError, match="`vae` has 3 latent channels, `transformer` expects 4"):
        pipe("a", image=PICTURE)
