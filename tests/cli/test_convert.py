"""``gspn2 convert`` on a tiny PixArt model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))

from tiny_denoisers import tiny_pixart


@pytest.fixture(scope="module")
def pixart(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "pixart"
    tiny_pixart().save_pretrained(folder)
    return folder


def test_converts_a_folder(gspn2, pixart, tmp_path):
    out = tmp_path / "new" / "converted"
    result = gspn2("convert", pixart, out, "--proxy-ratio", 4, "--keep-attention", 1, "--dtype", "bf16")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{out}: GSPN2PixArtTransformer2DModel, 2 layers converted\n"
    config = json.loads((out / "config.json").read_text())
    layers = config["gspn2_conversion"]["layers"]
    assert [layer["proxy_dim"] for layer in layers.values()] == [8, 8]
    assert [item.name for item in out.parent.iterdir()] == ["converted"], "nothing temporary is left"


def test_layers_by_pattern(gspn2, pixart, tmp_path):
    result = gspn2("convert", pixart, tmp_path / "out", "--layers", "*.0", "--layers", "*.2.attn1")
    assert result.code == 0
    assert "2 layers converted" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere/at/all", "OUT"], 1, "'nowhere/at/all' cannot be converted"),
        (["MODEL", "EXISTS"], 1, "exists; name a new folder"),
        (["MODEL", "OUT", "--init", "ones"], 2, "--init must be one of attention, random, zero, got 'ones'"),
        (["MODEL", "OUT", "--layers", "mid"], 1, "'mid' matches no self-attention layer"),
        (["MODEL", "OUT", "--dtype", "int8"], 2, "--dtype must be one of"),
    ],
)
def test_bad_input(gspn2, pixart, tmp_path, arguments, code, message):
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "file").touch()
    places = {"MODEL": pixart, "OUT": tmp_path / "out", "EXISTS": tmp_path / "exists"}
    result = gspn2("convert", *(places.get(item, item) for item in arguments))
    assert result.code == code
    assert len(result.error_lines) == 1
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_disk_too_small(gspn2, pixart, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    result = gspn2("convert", pixart, tmp_path / "out")
    assert result.code == 1
    assert "its disk has 0.0 GB left" in result.err
