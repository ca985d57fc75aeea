"""Pictures that come in, their masks and sizes, and what the page remembers and tells of its own."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import pytest
from bad_pictures import png_of_size
from PIL import Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.cli.console import CliError, UsageError
from gspn2_diffusion.png_metadata import GenerationSettings, save_picture
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import DrawRequest, Limits
from gspn2_diffusion.webapp.pictures import (
    check_picture,
    check_upload,
    fitted,
    natural_size,
    painted,
    read_picture,
)
from gspn2_diffusion.webapp.records import (
    HISTORY,
    SOURCES,
    Record,
    add_record,
    details_html,
    differences_html,
)
from gspn2_diffusion.webapp.restore import restore
from gspn2_diffusion.webapp.shelf import build_shelf
from gspn2_diffusion.webapp.worker import Worker

LIMITS = Limits(upload_bytes=100_000, upload_pixels=10_000)
REQUEST = DrawRequest("a cat", "", 32, 16, 3, 2.0, "euler", 5, 1)
SETTINGS = GenerationSettings("a <b>cat</b>", "", 4, 2.5, 11, 64, 128, "tiny", "ab" * 32, "Euler")


def test_camera_pictures_stand_upright_on_white(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by the camera
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg", LIMITS).size == (20, 40)
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    assert read_picture(tmp_path / "clear.webp", LIMITS).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GIF89a" + b"\0" * 50, "not a PNG"),
        (png_of_size(200, 100), "200 x 100 pixels"),
        (b"\0" * 200_000, "larger than 0 MB"),
    ],
)
def test_uploads_are_judged_before_they_are_decoded(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "upload.jpg"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(AppError, match=words) as failure:
            check_upload(source, LIMITS)
        assert str(tmp_path) not in str(failure.value)


def test_damaged_pictures_are_refused(tmp_path: Path) -> None:
    Image.radial_gradient("L").resize((90, 90)).convert("RGB").save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(AppError, match="damaged"):
        read_picture(tmp_path / "half.png", LIMITS)


def test_paint_becomes_a_mask() -> None:
    empty, left, right = (Image.new("RGBA", (8, 8)) for _ in range(3))
    left.putpixel((1, 1), (255, 0, 0, 255))
    right.putpixel((6, 6), (0, 0, 255, 90))
    right.putpixel((5, 5), (0, 0, 255, 3))  # no paint, only its soft edge
    assert painted([empty]) is None
    assert painted([]) is None
    mask = painted([empty, left, None, right])
    assert mask is not None
    assert [mask.getpixel(at) for at in ((1, 1), (6, 6), (5, 5), (0, 0))] == [255, 255, 0, 0]


def test_pictures_are_cut_around_their_centre() -> None:
    picture = Image.new("RGB", (60, 20), "blue")
    picture.paste("red", (20, 0, 40, 20))
    mask = Image.new("L", (60, 20))
    mask.paste(255, (20, 0, 30, 20))
    request = fitted(dataclasses.replace(REQUEST, width=16, height=16, picture=picture, mask=mask))
    assert (request.task, request.picture.size, request.mask.size) == ("inpaint", (16, 16), (16, 16))  # type: ignore[union-attr]
    assert request.picture.getpixel((8, 8)) == (255, 0, 0)  # type: ignore[union-attr]
    assert sorted(set(request.mask.tobytes())) == [0, 255]  # type: ignore[union-attr]
    edge = Image.new("L", (60, 20))
    edge.paste(255, (0, 0, 5, 20))
    with pytest.raises(AppError, match="outside the part"):
        fitted(dataclasses.replace(request, picture=picture, mask=edge))
    assert fitted(REQUEST) is REQUEST


def test_masks_and_pictures_that_do_not_fit() -> None:
    picture = Image.new("RGB", (20, 20))
    for mask, words in ((Image.new("L", (20, 10), 255), "20 x 10"), (Image.new("L", (20, 20)), "empty")):
        with pytest.raises(AppError, match=words):
            check_picture(picture, mask)
    with pytest.raises(AppError, match="at least"):
        check_picture(Image.new("RGB", (3, 300)), None)


@pytest.mark.parametrize("size", [(300, 200), (4000, 100), (5, 5)])
def test_sizes_keep_the_shape_of_the_picture(size: tuple[int, int]) -> None:
    width, height = natural_size(size, 256, 64, 512)
    assert width % 16 == height % 16 == 0
    assert min(width, height) >= 64
    assert max(width, height) <= 512
    if size == (300, 200):
        assert (width, height) == (320, 208)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_settings_come_back_from_every_format(tmp_path: Path, ending: str) -> None:
    loras = [{"name": "ink", "sha256": "cd" * 32, "weight": 0.5}]
    settings = dataclasses.replace(SETTINGS, loras=loras)
    found = restore(save_picture(Image.new("RGB", (8, 8)), tmp_path / f"a.{ending}", settings), LIMITS)
    assert (found.prompt, found.seed, found.loras, found.note) == (SETTINGS.prompt, 11, loras, "")
    drawn_from = dataclasses.replace(settings, source={"task": "img2img", "strength": 0.5})
    path = save_picture(Image.new("RGB", (8, 8)), tmp_path / f"b.{ending}", drawn_from)
    assert "drawn from another picture" in restore(path, LIMITS).note


def test_history_forgets_what_old_pictures_were_drawn_from() -> None:
    picture = Image.new("RGB", (8, 8))
    history: list[Record] = []
    for number in range(HISTORY + 5):
        source = picture if number % 2 else None
        request = dataclasses.replace(REQUEST, picture=source, seed=number)
        history = add_record(history, Record(f"{number}.png", SETTINGS, request))
    assert [record.path for record in history[:2]] == [f"{HISTORY + 4}.png", f"{HISTORY + 3}.png"]
    assert len(history) == HISTORY
    kept = [record.request for record in history if record.request]
    assert sum(request.picture is not None for request in kept) == SOURCES
    assert len(kept) == HISTORY - (HISTORY // 2 - SOURCES)


def test_what_differs_between_two_pictures_is_told_and_escaped() -> None:
    older = Record("a.png", SETTINGS)
    assert "are the same" in differences_html(older, Record("b.png", SETTINGS))
    changed = dataclasses.replace(SETTINGS, prompt="<i>", source={"task": "inpaint", "strength": 0.7})
    shown = differences_html(older, Record("b.png", changed))
    assert "&lt;b&gt;cat" in shown
    assert "&lt;i&gt;" in shown
    assert "Seed" not in shown
    assert "a part of a picture, strength 0.7" in details_html(Record("b.png", changed))


def test_worker_outlives_what_fails_and_keeps_the_order(caplog: pytest.LogCaptureFixture) -> None:
    worker, seen = Worker("test"), []
    threads: set[int] = set()

    def note(number: int) -> None:
        threads.add(threading.get_ident())
        seen.append(number)
        if number == 1:
            raise RuntimeError("broken on purpose")

    ends = [worker.submit(functools.partial(note, number)) for number in range(4)]
    assert all(end.wait(600) for end in ends)
    assert seen == [0, 1, 2, 3]
    assert len(threads) == 1
    assert "broken on purpose" in caplog.text
    last = worker.submit(functools.partial(note, 4))
    for _ in range(2):
        worker.close()  # after what it has been given
    assert last.is_set()
    assert threads.isdisjoint(thread.ident for thread in threading.enumerate())


def test_only_what_is_there_comes_on_the_shelf(tmp_path: Path) -> None:
    for name in ("one/tiny", "two/tiny"):
        build_tiny_pipeline().save_pretrained(tmp_path / name)
    with pytest.raises(UsageError, match="two models are called 'tiny'"):
        build_shelf([str(tmp_path / "one/tiny"), str(tmp_path / "two/tiny")])
    with pytest.raises(CliError, match="is no folder"):
        build_shelf([str(tmp_path / "one/tiny")], tmp_path / "none")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(CliError, match="broken"):
        build_shelf([str(tmp_path / "one/tiny")], tmp_path / "loras")
    shelf = build_shelf([str(tmp_path / "one/tiny"), "gspn2-emoji"])
    assert (shelf.first, list(shelf.models)) == ("tiny", ["tiny", "gspn2-emoji"])
    assert (shelf.check_model(""), shelf.check_lora("")) == ("tiny", "")
    for check in (shelf.check_model, shelf.check_lora):
        with pytest.raises(AppError, match="must be one of"):
            check(str(tmp_path))
