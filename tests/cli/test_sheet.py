"""``gspn2 sheet``: pictures on one page."""

from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from gspn2_diffusion.batch import manifest
from gspn2_diffusion.batch.sheet import MARGIN, wrap

COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#00ffff"]


@pytest.fixture
def folder(tmp_path):
    records = []
    for index, colour in reversed(list(enumerate(COLOURS, 1))):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 32), colour).save(path)
        common = {"index": index, "prompt": "a long prompt 🍎 " * 9, "seed": index, "key": str(index)}
        records.append({**common, "status": "done", "file": path.name, "bytes": path.stat().st_size})
    manifest.append(
        tmp_path, [*records, {"key": "x", "status": "failed", "prompt": "b", "seed": 0, "index": 9}]
    )
    return tmp_path


@pytest.mark.parametrize("labels", ["--labels", "--no-labels"])
def test_pictures_stand_in_the_order_of_the_list(gspn2, folder, labels):
    path = folder / "page.png"
    result = gspn2("sheet", folder, "-o", path, "--columns", 2, "--size", 32, labels)
    assert (result.code, result.out, result.err) == (0, f"{path}\n", "")
    with Image.open(path) as page:
        assert page.width == 2 * (32 + MARGIN) + MARGIN
        step = (page.height - MARGIN) // 3
        centres = [(MARGIN + 16 + k % 2 * (32 + MARGIN), MARGIN + 16 + k // 2 * step) for k in range(5)]
        found = [page.getpixel(centre) for centre in centres]
        below = page.crop((MARGIN, MARGIN + 32, MARGIN + 32, MARGIN + step))
        written = below.convert("L").getextrema()[0] < 128
    assert [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in found] == COLOURS
    assert written is (labels == "--labels")


def test_labels_fit():
    font = ImageFont.load_default(12)
    for text in ("a cat", "word " * 50, "x" * 300, "short and thenaverylongwordthatneverends" * 3):
        lines = wrap(text, font, 80)
        assert len(lines) <= 3
        assert all(font.getlength(line) <= 80 for line in lines)
    assert wrap("a cat on a mat", font, 1000) == ["a cat on a mat"]
    assert wrap("word " * 50, font, 80)[-1].endswith("...")


def test_sheet_errors(gspn2, folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for command, code in (
        ((empty, "-o", tmp_path / "x.png"), 1),
        ((tmp_path / "none", "-o", tmp_path / "x.png"), 1),
        ((folder, "-o", tmp_path / "none" / "x.png"), 1),
        ((folder, "-o", tmp_path / "x.gif"), 2),
        ((folder, "-o", tmp_path / "x.png", "--size", 8), 2),
    ):
        result = gspn2("sheet", *command)
        assert (result.code, len(result.error_lines), result.out) == (code, 1, ""), command
