"""GSPN2InpaintPipeline: what is kept and what is drawn, masks of every kind, and bad ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.image_inputs import soften
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline

PROMPT = "a red apple"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


PICTURE = torch.rand(1, 3, 16, 16, generator=seeded(11))
MASK = torch.zeros(1, 1, 16, 16)
MASK[:, :, 3:9, 4:12] = 1  # rows 3..8: the latents of rows 2..9 are touched


@pytest.fixture(scope="module")
def pipe() -> GSPN2InpaintPipeline:
    pipeline = GSPN2InpaintPipeline.from_pipe(build_tiny_pipeline())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe: GSPN2InpaintPipeline, image: Any = PICTURE, mask: Any = MASK, **options: Any) -> torch.Tensor:
    settings = {"generator": seeded(0), "num_inference_steps": 4, "output_type": "pt", **options}
    return pipe(settings.pop("prompt", PROMPT), image=image, mask_image=mask, **settings).images


def test_pixels_outside_the_mask_are_the_pictures_own(pipe: GSPN2InpaintPipeline) -> None:
    drawn = draw(pipe)
    inside = MASK.expand_as(PICTURE) == 1
    torch.testing.assert_close(drawn[~inside], PICTURE[~inside], atol=1e-6, rtol=0)
    assert (drawn - PICTURE)[inside].abs().mean() > 0.05
    as_decoded = draw(pipe, paste_unmasked=False)
    assert (as_decoded - PICTURE)[~inside].abs().mean() > 0.01
    torch.testing.assert_close(as_decoded[inside], drawn[inside])


def test_latents_outside_the_mask_are_the_pictures_own(pipe: GSPN2InpaintPipeline) -> None:
    latents = draw(pipe, output_type="latent")
    with torch.no_grad():
        clean = pipe.encode_pictures(2 * PICTURE - 1, torch.device("cpu"))
    touched = torch.zeros(1, 1, 8, 8)
    touched[:, :, 1:5, 2:6] = 1
    kept = touched.expand_as(latents) == 0
    torch.testing.assert_close(latents[kept], clean[kept], atol=1e-6, rtol=0)
    assert (latents - clean)[~kept].abs().min() > 0


def test_kept_latents_carry_the_noise_of_every_step(pipe: GSPN2InpaintPipeline) -> None:
    trail = []

    def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        trail.append({name: tensor.clone() for name, tensor in tensors.items()})
        return tensors

    names = ["latents", "mask", "image_latents", "noise"]
    draw(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    for seen, sigma in zip(trail, (0.75, 0.5, 0.25, 0.0), strict=True):
        kept = seen["mask"].expand_as(seen["latents"]) == 0
        expected = (1 - sigma) * seen["image_latents"] + sigma * seen["noise"]
        torch.testing.assert_close(seen["latents"][kept], expected[kept])


def test_full_mask_is_image_to_image_and_empty_mask_gives_the_picture(pipe: GSPN2InpaintPipeline) -> None:
    plain = GSPN2Img2ImgPipeline.from_pipe(pipe)
    options = {"strength": 0.75, "generator": seeded(0), "num_inference_steps": 4, "output_type": "pt"}
    expected = plain(PROMPT, image=PICTURE, **options).images
    full = draw(pipe, mask=torch.ones(1, 1, 16, 16), strength=0.75)
    torch.testing.assert_close(full, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(draw(pipe, mask=torch.zeros(1, 1, 16, 16)), PICTURE, atol=1e-6, rtol=0)


def test_all_kinds_of_masks_are_the_same(pipe: GSPN2InpaintPipeline) -> None:
    grey = PIL.Image.fromarray((MASK[0, 0].numpy() * 200).astype(np.uint8))  # over one half: drawn
    flat = MASK[0, 0]
    kinds = [grey, [grey], grey.convert("RGB"), grey.point(lambda v: 255 * (v > 0)).convert("1")]
    kinds += [flat, flat[None], flat.bool(), 0.6 * flat, flat.double()]
    kinds += [flat.numpy(), flat.numpy()[None], flat.numpy()[..., None], flat.numpy()[None, ..., None]]
    expected = draw(pipe)
    for mask in kinds:
        torch.testing.assert_close(draw(pipe, mask=mask), expected, atol=1e-6, rtol=0)
    assert (draw(pipe, mask=0.4 * MASK) - PICTURE).abs().max() < 1e-5  # under one half: kept


def test_blur_softens_the_edge_only(pipe: GSPN2InpaintPipeline) -> None:
    hard, soft = draw(pipe), draw(pipe, mask_blur=1.0)
    assert (hard - soft).abs().max() > 0.01
    assert torch.equal(hard[..., 15, :], soft[..., 15, :])  # far from the mask
    edges = soften(MASK, 1.0)
    assert 0 < edges[0, 0, 2, 8] < 0.5 < edges[0, 0, 3, 8] < 1
    assert soften(MASK, 0) is MASK


def test_batches_and_resizing(pipe: GSPN2InpaintPipeline) -> None:
    images, masks = torch.cat([PICTURE, PICTURE.flip(-1)]), torch.cat([MASK, MASK.flip(-2)])
    generators = [seeded(0), seeded(1)]
    together = draw(pipe, images, masks, prompt=[PROMPT, "a rocket"], generator=generators)
    alone = draw(pipe, images[1:], masks[1:], prompt="a rocket", generator=seeded(1))
    torch.testing.assert_close(together[1:], alone, atol=2e-5, rtol=0)
    small = PIL.Image.new("RGB", (15, 9), "red")
    mask = PIL.Image.new("L", (15, 9))
    mask.paste(255, (0, 0, 7, 9))
    drawn = draw(pipe, small, mask, height=16, width=20)
    assert drawn.shape == (1, 3, 16, 20)
    torch.testing.assert_close(drawn[0, :, :, 12:], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 8))
    assert torch.equal(draw(pipe), draw(pipe))


def test_latents_as_the_picture(pipe: GSPN2InpaintPipeline) -> None:
    with torch.no_grad():
        latents = pipe.encode_pictures(2 * PICTURE - 1, torch.device("cpu"))
    torch.testing.assert_close(draw(pipe, latents), draw(pipe, paste_unmasked=False), atol=1e-5, rtol=0)


def test_masked_image_latents_are_what_stands_outside(pipe: GSPN2InpaintPipeline) -> None:
    with torch.no_grad():
        clean = pipe.encode_pictures(2 * PICTURE - 1, torch.device("cpu"))
    torch.testing.assert_close(draw(pipe, masked_image_latents=clean), draw(pipe))
    other = torch.full_like(clean, 0.7)
    latents = draw(pipe, masked_image_latents=other, output_type="latent")
    touched = torch.zeros(1, 1, 8, 8)
    touched[:, :, 1:5, 2:6] = 1
    kept = touched.expand_as(latents) == 0
    torch.testing.assert_close(latents[kept], other[kept])
    assert (latents - other)[~kept].abs().min() > 0
    names = ["masked_image_latents"]
    seen = []
    draw(
        pipe,
        masked_image_latents=other,
        callback_on_step_end=lambda pipe, step, time, tensors: seen.append(tensors) or {},
        callback_on_step_end_tensor_inputs=names,
    )
    assert all(torch.equal(tensors["masked_image_latents"], other) for tensors in seen)


def big_picture() -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """60 x 40 pixels, of which a 6 x 4 part is to be drawn."""
    pixels = torch.randint(0, 256, (40, 60, 3), generator=seeded(5), dtype=torch.uint8)
    mask = PIL.Image.new("L", (60, 40))
    mask.paste(255, (20, 10, 26, 14))
    return PIL.Image.fromarray(pixels.numpy()), mask


def test_padding_mask_crop_draws_the_surroundings_and_keeps_the_rest(pipe: GSPN2InpaintPipeline) -> None:
    image, mask = big_picture()
    sizes = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-2:]))
    drawn = draw(pipe, image, mask, padding_mask_crop=3, output_type="pil", height=16, width=24)[0]
    handle.remove()
    assert set(sizes) == {(8, 12)}
    assert drawn.size == image.size
    before, after = np.asarray(image), np.asarray(drawn)
    inside = np.asarray(mask) == 255
    np.testing.assert_array_equal(before[~inside], after[~inside])
    assert np.abs(before[inside].astype(int) - after[inside]).mean() > 10
    loose = draw(
        pipe, image, mask, padding_mask_crop=3, output_type="pil", height=16, width=24, paste_unmasked=False
    )[0]
    changed = (np.asarray(loose) != before).any(axis=-1)
    rows, columns = np.nonzero(changed)  # 12 x 10 pixels around the mask, widened to 3 : 2
    assert (rows.min(), rows.max() + 1) == (7, 17)
    assert columns.min() <= 17
    assert 29 <= columns.max() + 1 <= 33


def test_padding_mask_crop_over_the_whole_picture_is_plain_inpainting(pipe: GSPN2InpaintPipeline) -> None:
    image = PIL.Image.fromarray((PICTURE[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    mask = PIL.Image.fromarray((MASK[0, 0].numpy() * 255).astype(np.uint8))
    plain = draw(pipe, image, mask, output_type="pil")[0]
    cropped = draw(pipe, image, mask, output_type="pil", padding_mask_crop=16)[0]
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(cropped)).max() <= 1


CROP = {"padding_mask_crop": 4, "output_type": "pil"}
ERRORS = {
    "crop of a tensor": (CROP, TypeError, "`image` must be one PIL picture with `padding_mask_crop`"),
    "crop with a mask of tensors": (
        {**CROP, "image": PIL.Image.new("RGB", (16, 16))},
        TypeError,
        "`mask_image` must be one PIL picture with `padding_mask_crop`, got Tensor",
    ),
    "crop to arrays": (
        {**CROP, "image": big_picture()[0], "mask_image": big_picture()[1], "output_type": "np"},
        ValueError,
        "`output_type` must be 'pil' with `padding_mask_crop`.*got 'np'",
    ),
    "crop to nothing": (
        {**CROP, "image": big_picture()[0], "mask_image": PIL.Image.new("L", (60, 40), 100)},
        ValueError,
        "`mask_image` marks nothing",
    ),
    "crop of another size": (
        {**CROP, "image": big_picture()[0], "mask_image": PIL.Image.new("L", (60, 41))},
        ValueError,
        "size of `image`, 40 x 60 pixels .*, got 41 x 60",
    ),
    "negative padding": (
        {**CROP, "padding_mask_crop": -1},
        ValueError,
        "`padding_mask_crop` must be at least 0, got -1",
    ),
    "masked latents": (
        {"masked_image_latents": torch.zeros(1, 4, 8, 9)},
        ValueError,
        r"`masked_image_latents` must have the shape \(1, 4, 8, 8\) for this call, got \(1, 4, 8, 9\)",
    ),
    "number of masked latents": (
        {"masked_image_latents": torch.zeros(2, 4, 8, 8)},
        ValueError,
        "`masked_image_latents` .* 1 prompts came with 2",
    ),
    "type of masked latents": (
        {"masked_image_latents": [1.0]},
        TypeError,
        "`masked_image_latents` must be a torch.Tensor, got list",
    ),
    "no mask": ({"mask_image": None}, ValueError, "`mask_image` is needed"),
    "size": (
        {"mask_image": torch.zeros(1, 1, 16, 12)},
        ValueError,
        r"size of `image`, 16 x 16 pixels .*, got 16 x 12",
    ),
    "pil size": ({"mask_image": PIL.Image.new("L", (8, 16))}, ValueError, "got 16 x 8"),
    "mode": (
        {"mask_image": PIL.Image.new("RGBA", (16, 16))},
        ValueError,
        r"modes 1, L, RGB, got 'RGBA'; convert it",
    ),
    "float mode": ({"mask_image": PIL.Image.new("F", (16, 16))}, ValueError, "got 'F'"),
    "channels": (
        {"mask_image": torch.zeros(1, 3, 16, 16)},
        ValueError,
        r"one channel, got .*\(1, 3, 16, 16\)",
    ),
    "bytes": ({"mask_image": MASK.byte()}, TypeError, "`mask_image` must hold floats .* torch.uint8"),
    "range": (
        {"mask_image": 255 * MASK},
        ValueError,
        r"`mask_image` must lie in \[0, 1\], got \[0.0, 255.0\]",
    ),
    "type": ({"mask_image": "mask.png"}, TypeError, "`mask_image` must be a PIL picture.*got str"),
    "none": ({"mask_image": []}, ValueError, "`mask_image` is an empty list"),
    "count": ({"mask_image": torch.zeros(3, 1, 16, 16)}, ValueError, "`mask_image` .* 1 prompts came with 3"),
    "blur": ({"mask_blur": -1}, ValueError, "`mask_blur` must be at least 0 pixels, got -1"),
    "strength": ({"strength": 2}, ValueError, r"`strength` must lie in \[0, 1\], got 2"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_bad_input(pipe: GSPN2InpaintPipeline, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        pipe("a", **{"image": PICTURE, "mask_image": MASK, **options})
