"""Reading, selecting, drawing and naming prepared emoji pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2_diffusion.training.emoji import (
    STYLE_WORDS,
    STYLES,
    EmojiPictureError,
    EmojiRecord,
    load_records,
    load_sprites,
    object_phrase,
    rasterize,
    select,
    style_phrase,
)
from gspn2_diffusion.training.emoji_captions import with_article

pytest.importorskip("resvg")

RED_BOX = '<path fill="#f00" d="M2 3h4v2h-4z"/>'


@pytest.fixture
def svg(tmp_path: Path) -> Callable[..., Path]:
    def write(body: str = RED_BOX, box: str = "0 0 32 32", name: str = "one") -> Path:
        path = tmp_path / f"{name}.svg"
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>')
        return path

    return write


def record(path: Path = Path("x.svg"), **changes: Any) -> EmojiRecord:
    values: dict[str, Any] = {
        "id": f"flat/{path.stem}",
        "style": "flat",
        "concept": "apple",
        "name": "red apple",
        "aliases": ("apple",),
        "tags": ("fruit",),
        "group": "food-drink",
        "split": "train",
        "file": path.name,
        "path": path,
    }
    return EmojiRecord(**{**values, **changes})


# --- words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phrase",
    ["an owl", "a unicorn", "an hourglass", "a ewe", "a one-piece swimsuit", "an octopus", "a bus", "grapes",
     "an eye in clouds", "two hearts", "bread", "statue of liberty", "a glass of milk", "an x-ray",
     "scissors", "a pair of scissors", "a face savoring food", "a two-hump camel", "a cactus", "an apple"],
)  # fmt: skip
def test_articles(phrase: str) -> None:
    bare = phrase.removeprefix("an ").removeprefix("a ")
    assert with_article(bare) == phrase


def test_phrases_are_mostly_the_name_and_sometimes_an_alias() -> None:
    rng = random.Random(0)
    phrases = [object_phrase(record(), rng) for _ in range(2000)]
    assert set(phrases) == {"a red apple", "red apple", "an apple", "apple"}
    assert phrases.count("a red apple") > 800
    smile = record(name="grinning face", aliases=("grinning",), group="smileys-emotion")
    assert "a grinning" not in {object_phrase(smile, rng) for _ in range(500)}


def test_every_style_has_words() -> None:
    assert set(STYLE_WORDS) == set(STYLES)
    assert style_phrase("firefox-os") == "firefox os style"
    with pytest.raises(ValueError, match=r"oil.*allowed"):
        style_phrase("oil")


# --- pixels ------------------------------------------------------------------------------------------------


def drawn_box(alpha: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.where(alpha.max(1) > 8)[0], np.where(alpha.max(0) > 8)[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("box", ["0 0 32 32", "0 0 8 8", "-4 -9 64 48"])
def test_rasterize_fits_and_centres_whatever_the_padding(svg: Callable[..., Path], box: str) -> None:
    pixels = rasterize(svg(box=box), 100)
    assert pixels.shape == (100, 100, 4)
    assert pixels.dtype == np.uint8
    left, top, right, bottom = drawn_box(pixels[..., 3])
    assert abs((right - left) - 92) <= 1, "the long side fills the square but for the margin"
    assert abs((bottom - top) - 46) <= 2, "the shape is kept: twice as wide as high"
    assert abs(left + right - 100) <= 1
    assert abs(top + bottom - 100) <= 1
    assert tuple(pixels[50, 50]) == (255, 0, 0, 255)


def test_bitmaps_keep_straight_colour_at_half_transparent_edges(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64))
    image.paste((0, 200, 0, 128), (5, 10, 25, 30))
    image.save(tmp_path / "one.webp", lossless=True)
    pixels = rasterize(record(tmp_path / "one.webp"), 64)
    solid = pixels[pixels[..., 3] > 100]
    assert np.abs(solid[:, :3].astype(int) - (0, 200, 0)).max() <= 3, "no dark fringe"
    assert np.abs(solid[:, 3].astype(int) - 128).max() <= 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.svg", b"<svg viewBox='0 0 1 1'"),
        ("b.svg", b'<svg viewBox="0 0 4 4"><path'),
        ("c.webp", b"RIFF1234WEBP"),
        ("d.svg", b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"></svg>'),
        ("e.svg", b"\xff\xfe\x00"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EmojiPictureError, match=name):
        rasterize(tmp_path / name, 32)


def test_sprites_keep_order_name_the_damaged_and_cache(svg: Callable[..., Path], tmp_path: Path) -> None:
    colours = ["#f00", "#0f0", "#00f"]
    good = [
        record(svg(body=f'<circle r="3" fill="{colours[number % 3]}"/>', box="-4 -4 8 8", name=f"p{number}"))
        for number in range(70)
    ]
    sprites = load_sprites(good, size=16, workers=2, cache_dir=tmp_path / "cache")
    assert sprites.shape == (70, 4, 16, 16)
    assert sprites.dtype == torch.uint8
    assert torch.equal(sprites[:, :3, 8, 8].argmax(1), torch.arange(70) % 3)
    for path in tmp_path.glob("*.svg"):
        path.write_text("x" * path.stat().st_size)  # same size: only the cache can answer now
    assert torch.equal(load_sprites(good, size=16, cache_dir=tmp_path / "cache"), sprites)
    with pytest.raises(EmojiPictureError, match=r"70 of 70.*p0\.svg"):
        load_sprites(good, size=16)


def test_blank_rows_stand_for_damaged_pictures(
    svg: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pictures = [record(svg(name="fine")), record(svg(body="", name="void"))]
    sprites = load_sprites(pictures, size=16, errors="blank")
    assert [bool(sprite.any()) for sprite in sprites] == [True, False]
    assert "1 of 2" in caplog.text
    assert "void.svg" in caplog.text


# --- loading -----------------------------------------------------------------------------------------------


def test_select_takes_train_and_the_curated_groups_by_default() -> None:
    rows = [
        record(),
        record(split="unseen_pair"),
        record(split="unseen_concept"),
        record(group="people-body"),
        record(style="noto"),
    ]
    assert select(rows) == [rows[0], rows[4]]
    assert select(rows, split=["unseen_pair", "unseen_concept"]) == rows[1:3]
    assert select(rows, groups=["people-body"]) == [rows[3]]
    assert select(rows, split=None, groups=None, styles=["noto"]) == [rows[4]]
    with pytest.raises(ValueError, match=r"`split`.*test.*allowed: train"):
        select(rows, split="test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: damaged"),
        ('{"id": "x"}', "line 1: damaged"),
        ("STYLE", "style 'oil'"),
        ("FILE", "outside"),
    ],
)
def test_a_damaged_listing_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = {
        "id": "flat/1", "style": "flat", "concept": "a", "name": "a", "aliases": [], "tags": [],
        "group": "objects", "split": "train", "file": "a.svg",
    }  # fmt: skip
    line = {"STYLE": json.dumps(good | {"style": "oil"}), "FILE": json.dumps(good | {"file": "../../a"})}.get(
        line, line
    )
    (tmp_path / "records.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path)


def test_missing_and_damaged_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*prepare_emoji"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"records\.jsonl"):
        load_records(tmp_path)
    (tmp_path / "bad.tar.xz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.tar\.xz"):
        load_records(tmp_path / "bad.tar.xz")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar.xz"]
