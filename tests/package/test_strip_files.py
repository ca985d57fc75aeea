"""PNG and TIFF written in strips are what Pillow reads back."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from gspn2_diffusion import strip_files
from gspn2_diffusion.strip_files import TiffStripWriter, open_strip_file


def picture(height: int, width: int) -> np.ndarray:
    """Smooth areas, where filters help, and noise, where they do not."""
    generator = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(height), 3 * np.arange(width))[..., None] * np.array([1, 2, 3])
    noise = generator.integers(0, 256, (height, width, 3))
    return np.where(np.arange(height)[:, None, None] % 40 < 20, ramp % 256, noise).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (97, 61), (700, 1024)])
def test_any_split_into_strips_gives_the_picture(tmp_path, suffix, height, width):
    pixels, path = picture(height, width), tmp_path / f"out{suffix}"
    with open_strip_file(path, width, height, {"key": "red ä 日本"}) as file:
        for start in range(0, height, 33):
            file.write(pixels[start : start + 33])
            assert not path.exists(), "the file appears when it is whole"
    with Image.open(path) as read:
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), pixels)
        if suffix == ".png":
            assert read.text["key"] == "red ä 日本"
    assert path.stat().st_size < pixels.nbytes + 1000
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_big_tiff(tmp_path, monkeypatch):
    monkeypatch.setattr(strip_files, "_CLASSIC_TIFF_LIMIT", 0)
    pixels, path = picture(50, 40000), tmp_path / "big.tif"
    with TiffStripWriter(path, 40000, 50, "text") as file:
        file.write(pixels)
    assert path.read_bytes()[2] == 43
    with Image.open(path) as read:
        assert np.array_equal(np.asarray(read), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_what_fails_leaves_nothing(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"

    def write(rows: np.ndarray) -> None:
        with open_strip_file(path, 4, 3) as file:
            file.write(rows)

    with pytest.raises(ValueError, match="2 rows came of 3"):
        write(np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="4 rows came, the picture has 3"):
        write(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"rows must be \(n, 4, 3\) uint8"):
        write(np.zeros((3, 4, 3), np.float32))
    with pytest.raises(ZeroDivisionError), open_strip_file(path, 4, 3):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_noticed_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**8))
    with (
        pytest.raises(OSError, match=r"16384 x 16384 pixels may take 0.81 GB, .* has 0.10 GB left"),
        open_strip_file(tmp_path / "out.png", 16384, 16384),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .png, .tif, .tiff, got .*out.jpg"):
        open_strip_file(tmp_path / "out.jpg", 4, 3)
