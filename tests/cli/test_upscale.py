"""``gspn2 upscale`` with a tiny model, which draws 16 x 16 pixels by itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

OPTIONS = ("--steps", 2, "--seed", 3, "--device", "cpu")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_draws_any_size_into_a_file(gspn2, tiny_model, tmp_path, suffix):
    out = tmp_path / "new" / f"out{suffix}"
    result = gspn2(
        "upscale", "a red apple", "-o", out, "-m", tiny_model, "--height", 37, "--width", 50, *OPTIONS
    )
    assert (result.code, result.out) == (0, f"{out}\n"), result.err
    assert result.err.startswith("plan: 50 x 37 pixels in about ")
    with Image.open(out) as picture:
        assert picture.size == (50, 37)
        if suffix == ".png":
            settings = json.loads(picture.text["gspn2-upscale"])
            assert (settings["seed"], settings["prompt"], settings["input"]) == (3, "a red apple", None)
            shown = gspn2("info", out).out
            assert "made by:            gspn2 upscale" in shown
            assert "seed:               3" in shown


def test_enlarges_a_picture(gspn2, tiny_model, tmp_path):
    small = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
    small.save(tmp_path / "small.png")
    out = tmp_path / "out.png"
    arguments = ["-i", tmp_path / "small.png", "--height", 32, "--width", 32, "--quiet"]
    result = gspn2("upscale", "a red apple", "-o", out, "-m", tiny_model, *arguments, *OPTIONS)
    assert (result.code, result.out, result.err) == (0, "", "")
    with Image.open(out) as picture:
        assert picture.size == (32, 32)


def test_plan_only(gspn2, tiny_model, tmp_path):
    result = gspn2("upscale", "x", "-o", tmp_path / "no" / "out.png", "-m", tiny_model, "--plan", *OPTIONS)
    assert result.code == 0
    assert "1024 x 1024 pixels in about" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "out.jpg"], 2, "--output must end in .png, .tif, .tiff"),
        (
            ["-o", "out.png", "--memory", "1MB"],
            1,
            "`memory_budget` is 0.00 GB; nothing of this shape would fit",
        ),
        (["-o", "out.png", "--memory", "lots"], 1, "`memory_budget` must be a number of bytes or a text"),
        (["-o", "out.png", "-i", "missing.png"], 1, "--input 'missing.png': no such file"),
        (["-o", "out.png", "--height", 3], 1, "`height` must be at least 4, got 3"),
    ],
)
def test_bad_input(gspn2, tiny_model, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = gspn2("upscale", "x", *arguments, "-m", tiny_model, "--quiet", *OPTIONS)
    assert result.code == code
    assert len(result.error_lines) == 1
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_disk_too_small(gspn2, tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    result = gspn2("upscale", "x", "-o", tmp_path / "out.png", "-m", tiny_model, "--quiet", *OPTIONS)
    assert result.code == 1
    assert "1024 x 1024 pixels may take 0.00 GB, the disk of" in result.err
