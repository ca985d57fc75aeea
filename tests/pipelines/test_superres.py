"""Large pictures: stages, tiles, the memory plan and the file."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_pipeline, tiny_vae

from gspn2_diffusion import GSPN2SuperResPipeline
from gspn2_diffusion.pipelines import low_memory, pipeline_gspn2_superres, tiled_vae
from gspn2_diffusion.pipelines.memory_plan import Costs, MemoryPlan, make_plan, parse_budget, plan_sizes

PROMPT = "a red apple"


@pytest.fixture(autouse=True)
def a_machine_with_a_gigabyte(monkeypatch):
    """What the process holds and what is free depend on the machine; plans in these tests do not."""
    monkeypatch.setattr(pipeline_gspn2_superres, "memory_state", lambda _: (0, 10**9))


@pytest.fixture(scope="module")
def shared() -> GSPN2SuperResPipeline:
    pipe = GSPN2SuperResPipeline.from_pipe(build_tiny_pipeline())
    pipe.register_modules(vae=tiny_vae(mid_block_add_attention=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, height=44, width=70, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": 3, "strength": 0.7, "output_type": "np", **options}
    return pipe(PROMPT, height=height, width=width, generator=generator, **settings)


# Sizes and plan


@pytest.mark.parametrize(
    ("native", "height", "width", "first"),
    [(256, 256, 256, (256, 256)), (256, 1024, 1024, (256, 256)), (1024, 16384, 16384, (1024, 1024)),
     (256, 1000, 3000, (160, 448)), (256, 100, 120, (112, 128)), (256, 512, 16384, (128, 4096))],
)  # fmt: skip
def test_stages_at_most_double_and_keep_the_shape(native, height, width, first):
    sizes = plan_sizes(native, height, width, 16)
    assert sizes[0] == first
    assert height <= sizes[-1][0] < height + 16
    assert width <= sizes[-1][1] < width + 16
    for small, large in itertools.pairwise(sizes):
        assert all(a < b <= 2.1 * a + 16 for a, b in zip(small, large, strict=True))
        assert small[0] / small[1] == pytest.approx(height / width, rel=0.15)


COSTS = Costs(
    resident=10**9,
    token=8000,
    token_feed_forward=11000,
    latent=128,
    vae=70000,
    patch=2,
    scale=8,
    strip=0,
)


@pytest.mark.parametrize("budget", [25 * 10**8, 4 * 10**9, 10**10, 10**11])
def test_less_memory_cuts_more_and_never_passes_the_budget(budget):
    plan = make_plan(COSTS, 4096, 6144, True, budget)
    assert plan.peak <= budget
    unbounded = make_plan(COSTS, 4096, 6144, True, 10**12)
    assert unbounded.guidance_together
    assert unbounded.feed_forward_tokens is None
    assert plan.vae_tile <= unbounded.vae_tile
    assert f"of {budget / 1e9:.1f} GB" in str(plan)


def test_what_does_not_fit_says_what_would():
    with pytest.raises(
        ValueError, match=r"at least .* GB, `memory_budget` is 3.00 GB; (\d+) x (\d+) would"
    ) as error:
        make_plan(COSTS, 16384, 8192, True, 3 * 10**9)
    height, width = (int(word) for word in str(error.value).split("; ")[1].split(" would")[0].split(" x "))
    assert height / width == pytest.approx(2, rel=0.01)
    assert make_plan(COSTS, height, width, True, 3 * 10**9).peak <= 3 * 10**9
    with pytest.raises(ValueError, match=r"`memory_budget` is 3.00 GB"):
        make_plan(COSTS, height + 64, width + 32, True, 3 * 10**9)
    with pytest.raises(ValueError, match="nothing of this shape would fit"):
        make_plan(COSTS, 1024, 1024, True, 10**9)


@pytest.mark.parametrize(("text", "size"), [("12GB", 12 * 10**9), ("1.5 GiB", 1610612736), (5e8, 5 * 10**8)])
def test_budgets(text, size):
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "12 parsec", 0, "1.2.3"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="`memory_budget` must be"):
        parse_budget(text)


# Tiles


@pytest.mark.parametrize(("length", "tile"), [(50, 50), (50, 32), (97, 33), (300, 100)])
def test_blend_weights_add_up_to_one(length, tile):
    total = torch.zeros(length * 2)
    for span in tiled_vae.spans(length, tile):
        weights = tiled_vae.blend_weights(span, length, 2)
        total[span.first * 2 : span.last * 2] += weights
        assert span.stop - span.start <= tile
    assert torch.allclose(total, torch.ones_like(total))


def test_tiles_show_no_seams(shared):
    """With pinned statistics a tile's pixels are the whole picture's; without they are not."""
    latents = torch.randn(1, 4, 41, 70, generator=torch.Generator().manual_seed(0))
    latents[..., 35:] += 2  # one half unlike the other: statistics differ from tile to tile

    def tiled() -> torch.Tensor:
        return torch.cat(list(tiled_vae.decode_strips(shared.decode_pixels, latents, 2, 32)), dim=1)

    with torch.no_grad():
        loose = tiled()
        with tiled_vae.pinned_statistics(shared.vae.decoder, lambda: shared.decode_pixels(latents)):
            whole, pinned = shared.decode_pixels(latents)[0], tiled()
        assert torch.allclose(whole, shared.decode_pixels(latents)[0], atol=1e-4), "statistics are taken back"
    assert torch.allclose(pinned, whole, atol=2e-3), "a quarter of a level of 255"
    assert float((loose - whole).abs().max()) > 10 * float((pinned - whole).abs().max())


@pytest.mark.parametrize("size", [(40, 60), (33, 47)])
def test_enlarging_in_tiles_is_enlarging_at_once(shared, size):
    latents = torch.randn(1, 4, 20, 30, generator=torch.Generator().manual_seed(0))

    def enlarge(tile: int) -> torch.Tensor:
        return tiled_vae.upscale_tiles(shared.decode_pixels, shared.encode_pixels, latents, size, 2, tile)

    with (
        torch.no_grad(),
        tiled_vae.pinned_statistics(shared.vae.decoder, lambda: shared.decode_pixels(latents)),
        tiled_vae.pinned_statistics(
            shared.vae.encoder, lambda: shared.encode_pixels(shared.decode_pixels(latents))
        ),
    ):
        assert torch.allclose(enlarge(32), enlarge(64), atol=1e-3)


def test_enlarged_pixels_lie_where_they_should():
    """A ramp over the picture stays a ramp, whatever the ratio and the tile."""
    ramp = torch.arange(30.0)[None, None, None].expand(1, 1, 24, 30).contiguous()
    large = tiled_vae.upscale_tiles(lambda x: x, lambda x: x, ramp, (60, 75), 1, 32)
    want = (torch.arange(75) + 0.5) / 2.5 - 0.5
    error = (large[0, 0, 30] - want)[5:-5]
    assert float(error.abs().max()) < 0.2, "bicubic kernels ripple on a ramp"
    assert abs(float(error.mean())) < 1e-3


# The pipeline


def test_any_size_and_the_same_picture_again(shared):
    result = draw(shared)
    assert result.images.shape == (1, 44, 70, 3)
    assert result.sizes == [(16, 24), (24, 40), (44, 72)]
    assert np.array_equal(result.images, draw(shared).images)
    assert not np.array_equal(result.images, draw(shared, seed=1).images)


def test_a_small_picture_is_drawn_as_the_plain_pipeline_draws(shared):
    plain = build_tiny_pipeline()
    plain.register_modules(vae=shared.vae)
    plain.set_progress_bar_config(disable=True)
    want = plain(PROMPT, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
    # Half a level of 255, and what float32 may lose over three steps.
    assert np.abs(draw(shared, 16, 16).images - want.images).max() <= 0.5 / 255 + 2e-5


def test_a_plan_is_kept_and_gives_the_same_picture(shared, monkeypatch):
    free = draw(shared, 160, 96, output_type="latent")
    seen: dict[str, list[int]] = {"tokens": [], "rows": [], "latents": []}
    first = shared.transformer.transformer_blocks[0].ff.net[0]
    feed_forward = first.register_forward_pre_hook(
        lambda _, args: seen["tokens"].append(args[0].shape[0] * args[0].shape[1])
    )
    rows = shared.transformer.patch_embed.register_forward_pre_hook(
        lambda _, args: seen["rows"].append(args[0].shape[0])
    )
    decoder = shared.vae.decoder.register_forward_pre_hook(
        lambda _, args: seen["latents"].append(max(args[0].shape[-2:]))
    )
    plan = MemoryPlan(160, 96, 10**9, 10**9, False, 256, 32, (3, 2))
    monkeypatch.setattr(shared, "make_plan", lambda *_: plan)
    tight = draw(shared, 160, 96, output_type="latent")
    for hook in (feed_forward, rows, decoder):
        hook.remove()
    assert tight.plan is plan
    assert max(seen["tokens"]) == 256
    assert max(seen["rows"]) == 1
    assert max(seen["latents"]) <= max(tight.plan.vae_tile + 2 * tiled_vae.MARGIN, tiled_vae.SMALL)
    difference = (tight.images - free.images).norm() / free.images.norm()
    assert float(difference) < 0.05, "statistics of tiles come from the picture in small"
    assert "forward" not in shared.transformer.transformer_blocks[0].ff.__dict__


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_file_holds_the_picture(shared, tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    result = draw(shared, output_path=path, output_texts={"key": "value"})
    assert result.images is None
    assert result.path == path
    want = draw(shared, output_type="pil").images[0]
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(want))


def test_a_picture_is_enlarged(shared):
    picture = draw(shared, 16, 16, output_type="pil").images[0]
    same = draw(shared, 32, 32, image=picture, strength=0)
    assert same.sizes == [(16, 16), (32, 32)]
    enlarged = np.asarray(picture.resize((32, 32), Image.BICUBIC), dtype=np.float32) / 255
    refined = draw(shared, 32, 32, image=picture, strength=0.9)
    assert np.abs(refined.images[0] - enlarged).mean() > 0
    assert refined.images.shape == (1, 32, 32, 3)


def test_stages_and_strengths_by_hand(shared):
    calls: list[int] = []

    def count(pipe, index, timestep, tensors):
        calls.append(tensors["latents"].shape[-1])
        return {}

    result = draw(
        shared, 32, 32, sizes=[(16, 16), (20, 24), (32, 32)], strength=[0.4, 1.0], callback_on_step_end=count
    )
    assert result.sizes == [(16, 16), (20, 24), (32, 32)]
    assert calls == [8] * 3 + [12] * 2 + [16] * 3


@torch.no_grad()
def test_scans_are_balanced_per_direction_and_put_back(shared):
    """Twice the lines of the trained size in one direction halve what that direction hands to the output."""
    mixer = shared.transformer.transformer_blocks[0].mixer
    assert mixer.directions == ("down", "up", "right", "left")
    tokens = torch.ones(1, 8 * 16, mixer.dim)
    for height, width, vertical, horizontal in ((8, 8, 1, 1), (8, 16, 1, 0.5), (16, 8, 0.5, 1)):
        some = tokens[:, : height * width]
        first, second = mixer_input(mixer, some, height, width).chunk(2, -1)
        wanted = mixer.to_out(torch.cat([first * vertical, second * horizontal], -1))
        with low_memory.balanced_scans(shared.transformer, height, width):
            found = mixer(some, height, width)
        torch.testing.assert_close(found, wanted)
        assert "forward" not in mixer.to_out.__dict__


def mixer_input(mixer, tokens, height, width):
    seen = []
    handle = mixer.to_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer(tokens, height, width)
    handle.remove()
    return seen[0]


def test_balance_matters_only_away_from_the_size_of_training(shared):
    small, large = ({"height": size, "width": size} for size in (16, 32))
    for options, differs in ((small, False), (large, True)):
        pictures = [draw(shared, **options, balance_scans=value).images for value in (True, False)]
        assert np.array_equal(*pictures) is not differs


def test_interrupting_stops_the_stages(shared):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = True
        return {}

    assert draw(shared, callback_on_step_end=stop, output_type="latent").images.shape == (1, 4, 8, 12)


def test_loads_by_name(tmp_path, shared):
    shared.save_pretrained(tmp_path)
    loaded = GSPN2SuperResPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.abs(draw(loaded, 32, 32).images - draw(shared, 32, 32).images).max() < 2 / 255


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"height": 3}, ValueError, "`height` must be at least 4, got 3"),
        ({"width": 4.0}, TypeError, "`width` must be an integer"),
        ({"strength": 1.5}, ValueError, r"`strength` must lie in \[0, 1\], got 1.5"),
        ({"strength": [0.5]}, ValueError, "one number per refining stage: 2, got 1"),
        ({"sizes": [(16, 16)]}, ValueError, r"`sizes` must end with `height` and `width`, \(44, 70\)"),
        ({"sizes": [(15, 16), (44, 70)]}, ValueError, r"`sizes\[0\].height` must be a multiple of 4"),
        ({"sizes": [(64, 16), (44, 70)]}, ValueError, "`sizes` must grow"),
        ({"sizes": 3}, TypeError, "`sizes` must be a list"),
        ({"memory_budget": "100MB"}, ValueError, "`memory_budget` is 0.10 GB; nothing of this shape"),
        ({"output_path": "out.jpg"}, ValueError, "must end in .png, .tif, .tiff"),
        ({"image": np.zeros((2, 16, 16, 3), np.float32)}, ValueError, "`image` must be one picture, got 2"),
    ],
)
def test_bad_input(shared, options, error, message):
    with pytest.raises(error, match=message):
        draw(shared, **options)


def test_one_prompt_only(shared):
    with pytest.raises(TypeError, match="`prompt` must be one text, got list"):
        shared([PROMPT, PROMPT])


def test_a_disk_too_small_is_noticed_before_drawing(shared, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match=r"the disk of .* has 0.00 GB left"):
        draw(shared, output_path=tmp_path / "out.png", callback_on_step_end=lambda *_: pytest.fail("drew"))


def test_values_that_are_not_numbers_leave_no_file(shared, tmp_path):
    def spoil(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(ValueError, match=r"values that are not numbers in torch.float32"):
        draw(shared, output_path=tmp_path / "out.png", callback_on_step_end=spoil)
    assert not list(tmp_path.iterdir())
