"""What needs neither Gradio nor a drawn picture: limits, words, uploads, the line of visitors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_pictures import png_of_size
from PIL import Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.png_metadata import GenerationSettings, save_png
from gspn2_diffusion.webapp.errors import AppError, as_sentences
from gspn2_diffusion.webapp.limits import RANDOM_SEED, Limits, check_request
from gspn2_diffusion.webapp.preview import CleanEstimate, LatentPreview, data_uri
from gspn2_diffusion.webapp.records import HISTORY, Record, Store, details_html, gallery_items
from gspn2_diffusion.webapp.restore import restore
from gspn2_diffusion.webapp.samplers import SCHEDULERS, build_scheduler, scheduler_name
from gspn2_diffusion.webapp.vocabulary import EMOJI, aspect_size, compose_prompt, split_prompt
from gspn2_diffusion.webapp.waiting import Line, Once, Running

LIMITS = Limits(side=256, steps=20, count=4, queue=2)
WISH: dict[str, Any] = {
    "prompt": "a red apple",
    "negative_prompt": "",
    "width": 128,
    "height": 64,
    "steps": 5,
    "guidance_scale": 3.0,
    "scheduler": "euler",
    "seed": 7,
    "count": 2,
}
SETTINGS = GenerationSettings(
    prompt="a <b>red</b> apple",
    negative_prompt="blue",
    steps=4,
    guidance_scale=2.5,
    seed=11,
    height=64,
    width=128,
    model="tiny",
    model_hash="ab" * 32,
    scheduler="FlowMatchEulerDiscreteScheduler",
)


def test_import_and_help_load_neither_torch_nor_gradio() -> None:
    code = (
        "import sys; from gspn2_diffusion.cli import run; code = run(['app', '--help']); "
        "print('LOADED', code, [name for name in ('torch', 'gradio', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED 0 []" in done.stdout
    assert "--max-queue" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "x" * 1001}, "1001 characters"),
        ({"negative_prompt": "x" * 1001}, "negative prompt"),
        ({"width": 272}, "width"),
        ({"height": 100}, "multiple of 16"),
        ({"height": None}, "height"),
        ({"steps": 21}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"guidance_scale": float("nan")}, "Guidance"),
        ({"guidance_scale": "4"}, "Guidance"),
        ({"scheduler": "__class__"}, "scheduler"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"count": 5}, "number of pictures"),
        ({"count": True}, "number of pictures"),
    ],
)
def test_requests_outside_the_limits(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AppError, match=words):
        check_request(LIMITS, tuple(SCHEDULERS), **{**WISH, **change})


def test_request_within_the_limits() -> None:
    request = check_request(LIMITS, tuple(SCHEDULERS), **{**WISH, "steps": 20.0, "width": 256})
    assert (request.steps, request.width, request.seed, request.count) == (20, 256, 7, 2)
    seeds = {check_request(LIMITS, ("euler",), **{**WISH, "seed": RANDOM_SEED}).seed for _ in range(5)}
    assert len(seeds) > 1


@pytest.mark.parametrize("style", [None, "3d", "firefox os"])
@pytest.mark.parametrize("background", [None, "orange", "light blue"])
def test_words_into_the_prompt_and_back(style: str | None, background: str | None) -> None:
    prompt = compose_prompt("a cat, asleep", style, background)
    assert split_prompt(prompt, EMOJI) == ("a cat, asleep", style, background)


def test_words_of_the_model_card() -> None:
    assert compose_prompt("a fox", "flat", "orange") == "a fox, flat style, on an orange background"
    unknown = "a fox, on a plaid background"
    assert split_prompt(unknown, EMOJI) == (unknown, None, None)


@pytest.mark.parametrize("aspect", ["1:1", "4:3", "9:16"])
def test_shapes_keep_the_area(aspect: str) -> None:
    width, height = aspect_size(aspect, 256, 512)
    across, down = (int(part) for part in aspect.split(":"))
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(256 * 256, rel=0.1)
    assert width / height == pytest.approx(across / down, rel=0.1)
    assert max(aspect_size("16:9", 512, 512)) == 512


def test_restores_our_settings(tmp_path: Path) -> None:
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS)
    found = restore(path, LIMITS)
    assert (found.prompt, found.negative_prompt, found.seed) == (SETTINGS.prompt, "blue", 11)
    assert (found.width, found.height, found.steps, found.guidance_scale) == (128, 64, 4, 2.5)
    assert scheduler_name(found.scheduler) == "euler"
    assert not found.note


def test_restores_a_foreign_picture(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters",
        "a dog\nNegative prompt: a cat\nSteps: 9, CFG scale: 7, Seed: 3, Size: 512x768",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    found = restore(tmp_path / "a.png", LIMITS)
    assert (found.prompt, found.negative_prompt, found.steps, found.seed) == ("a dog", "a cat", 9, 3)
    assert (found.width, found.height, found.guidance_scale) == (512, 768, 7.0)
    assert "Another program" in found.note


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a PNG"),
        (b"GIF89a" + b"\0" * 100, "not a PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>" + b" " * 50, "not a PNG"),
        (png_of_size(60000, 60000), "too large"),
        (png_of_size(5000, 5000), "5000 x 5000"),
        (png_of_size(8, 8), "damaged"),
        (png_of_size(8, 8) + b"\0" * 2_000_000, "larger than 1 MB"),
    ],
)
def test_bad_uploads(tmp_path: Path, content: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**26)  # a server in this process has set its own
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(AppError, match=words) as failure:
        restore(path, Limits(upload_bytes=1_000_000))
    assert str(tmp_path) not in str(failure.value)


def test_picture_without_settings(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(AppError, match="carries no settings"):
        restore(tmp_path / "a.png", LIMITS)
    with pytest.raises(AppError, match="could not be read"):
        restore(tmp_path / "missing.png", LIMITS)


def test_line_keeps_order_and_length() -> None:
    line = Line(2)
    first, second = line.join(), line.join()
    with pytest.raises(AppError, match="2 requests are waiting"):
        line.join()
    assert (line.position(first), line.position(second)) == (0, 1)
    assert line.wait(second, 0.01) == 1
    line.leave(first)
    line.leave(first)
    assert line.wait(second, 0) == 0
    assert len(line) == 1


def test_stop_reaches_only_its_visitor() -> None:
    running = Running()
    mine, other = running.start("me"), running.start("you")
    assert running.stop("me") == 1
    assert mine.is_set()
    assert not other.is_set()
    running.end("me", mine)
    assert running.stop("me") == 0


def test_a_second_click_does_nothing_until_the_first_is_served() -> None:
    once = Once()
    with once.hold("mine") as first, once.hold("yours") as other:
        assert first
        assert other
        with once.hold("mine") as second:
            assert not second
        with once.hold("mine") as third:  # what was refused has not let go
            assert not third
    with once.hold("mine") as after:
        assert after


def test_unexpected_errors_become_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AppError) as failure, as_sentences("testing"):
        raise RuntimeError("/secret/path")
    assert "/secret" not in str(failure.value)
    assert "/secret/path" in caplog.text


def test_store_keeps_settings_and_escapes_text() -> None:
    store = Store()
    record = store.save(Image.new("RGB", (8, 8), "red"), SETTINGS)
    assert restore(record.path, LIMITS).seed == 11
    assert gallery_items([record]) == [(record.path, record.caption)]
    assert "<b>" not in details_html(record)
    store.close()
    assert not store.folder.exists()
    assert gallery_items([Record(record.path, SETTINGS)] * HISTORY) == []


def test_preview_of_the_autoencoder_s_own_latents() -> None:
    pipe = build_tiny_pipeline()
    preview = LatentPreview.fit(pipe)
    latents = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(0))
    picture = preview.picture(latents)
    assert picture.size == (10, 6)
    assert len(picture.getcolors() or []) > 10
    assert data_uri(picture).startswith("data:image/jpeg;base64,")
    assert preview.picture(latents * float("nan")).size == (10, 6)


def test_clean_estimate_is_exact_for_a_straight_path() -> None:
    clean, noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    estimate = CleanEstimate()
    estimate.update(0.2 * clean + 0.8 * noise, 0.8)
    assert torch.allclose(estimate.update(0.5 * clean + 0.5 * noise, 0.5), clean, atol=1e-5)
    assert torch.allclose(estimate.update(0.5 * clean + 0.5 * noise, 0.5), clean, atol=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_are_known_by_their_recorded_names(name: str) -> None:
    scheduler = build_scheduler(name, build_tiny_pipeline().scheduler)
    assert scheduler_name(type(scheduler).__name__) == name
