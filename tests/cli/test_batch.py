"""``gspn2 batch`` in this process: what lands in the folder, what is told, and every exit code but 130."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2_diffusion.batch import manifest, runner
from gspn2_diffusion.batch.sizes import BatchSizes
from gspn2_diffusion.cli import rendering
from gspn2_diffusion.files import model_hash
from gspn2_diffusion.png_metadata import read_settings

COMMON = ("--steps", 2, "--device", "cpu")


@pytest.fixture
def batch(gspn2, tiny_model, tmp_path):
    def call(text: str, *more: object, name: str = "prompts.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return gspn2(
            "batch", tmp_path / name, "--out", tmp_path / "out", "--model", tiny_model, *COMMON, *more
        )

    return call


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".jpg", ".webp")}


def test_pictures_are_those_of_generate_and_are_recorded(batch, gspn2, tiny_model, tmp_path):
    result = batch(
        "a red apple --d 5 --count 2\na {blue|red} rocket --n dots --w 24 --h 8 --l 2.5 --s 3 --d 9"
    )
    out = tmp_path / "out"
    assert (result.code, result.err) == (0, "")
    assert sorted(result.out.splitlines()) == sorted(str(out / name) for name in pictures(out))
    for record in records(out):
        settings = read_settings(out / record["file"])
        alone = tmp_path / "alone.png"
        more = (
            *("--negative", settings.negative_prompt, "--guidance", settings.guidance_scale),
            *("--height", settings.height, "--width", settings.width, "--device", "cpu"),
            *("--seed", settings.seed, "--steps", settings.steps, "--model", tiny_model),
        )
        assert gspn2("generate", settings.prompt, "-o", alone, *more).code == 0
        content = alone.read_bytes()
        assert content == (out / record["file"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert (record["prompt"], record["seed"]) == (settings.prompt, settings.seed)
        assert (record["model_hash"], record["status"]) == (model_hash(tiny_model), "done")
        assert record["seconds"] > 0
    assert sorted(r["seed"] for r in records(out)) == [5, 6, 9]
    (rocket,) = (r for r in records(out) if r["seed"] == 9)
    assert rocket["template"] == "a {blue|red} rocket"
    assert rocket["prompt"] in ("a blue rocket", "a red rocket")
    assert (rocket["width"], rocket["height"], rocket["steps"], rocket["guidance_scale"]) == (24, 8, 3, 2.5)


def test_running_again_draws_only_what_is_new_or_lost(batch, tmp_path, monkeypatch):
    drawn: list[str] = []
    true_draw = rendering.draw_batch

    def counting(pipe, settings, on_step=None):
        drawn.extend(item.prompt for item in settings)
        return true_draw(pipe, settings, on_step)

    monkeypatch.setattr(rendering, "draw_batch", counting)
    out = tmp_path / "out"
    assert batch("a\nb\n").code == 0
    first = pictures(out)
    assert batch("a\nb\n").code == 0
    assert sorted(drawn) == ["a", "b"]
    assert batch("c\nb\na\n").code == 0  # other places in the list, same pictures
    assert drawn[2:] == ["c"]
    assert pictures(out).items() > first.items()
    victim = out / next(r["file"] for r in records(out) if r["prompt"] == "b")
    victim.unlink()
    assert batch("c\nb\na\n").code == 0
    assert drawn[3:] == ["b"]


def test_a_saved_picture_that_was_not_recorded_is_kept(batch, tmp_path):
    """As after kill -9 between saving and recording; also a torn line, and half-written files."""
    out = tmp_path / "out"
    assert batch("a\nb\n").code == 0
    before = pictures(out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text(lines[0] + lines[1][:40])
    lost = json.loads(lines[1])["file"]
    stamp = (out / lost).stat().st_mtime_ns
    (out / json.loads(lines[0])["file"]).write_bytes(b"")
    (out / f".{json.loads(lines[0])['file']}.abc123.tmp").write_bytes(b"half")
    assert batch("a\nb\n").code == 0
    assert pictures(out) == before
    assert (out / lost).stat().st_mtime_ns == stamp
    assert list(out.glob("*.tmp")) + list(out.glob(".*.tmp")) == []
    assert all(manifest.is_finished(out, record, ".png") for record in manifest.read(out).values())


def test_a_name_in_use_is_left_alone(batch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001-5.png").write_bytes(b"someone else's")
    for prompt in ("a", "b"):
        assert batch(f"{prompt} --d 5").code == 0
    assert (out / "00001-5.png").read_bytes() == b"someone else's"
    assert sorted(read_settings(out / r["file"]).prompt for r in records(out)) == ["a", "b"]


def test_failed_pictures_are_recorded_and_tried_again(batch, tmp_path, monkeypatch):
    true_draw = rendering.draw_batch

    def failing(pipe, settings, on_step=None):
        if any(item.prompt == "bad" for item in settings):
            raise RuntimeError("no\nluck")
        drawn = true_draw(pipe, settings, on_step)
        drawn.finite[[item.prompt == "nan" for item in settings]] = False
        return drawn

    text = "a\nbad\nnan\nodd --w 18\nb\n"
    monkeypatch.setattr(rendering, "draw_batch", failing)
    result = batch(text, "--batch-size", 4)
    assert result.code == 3
    assert result.error_lines[-1].startswith("error: 3 of 5 pictures failed")
    status = {r["prompt"]: (r["status"], r.get("error", "")) for r in records(tmp_path / "out")}
    assert status["a"] == status["b"] == ("done", "")
    assert status["bad"] == ("failed", "RuntimeError: no luck")
    assert status["nan"] == ("failed", "values that are not numbers in float32")
    assert "multiples of 4" in status["odd"][1]
    monkeypatch.setattr(rendering, "draw_batch", true_draw)
    assert batch(text.replace("odd --w 18\n", "")).code == 0
    assert len(pictures(tmp_path / "out")) == 4
    assert {r["status"] for k, r in manifest.read(tmp_path / "out").items() if r["prompt"] != "odd"} == {
        "done"
    }


def test_batches_shrink_until_they_fit(batch, tmp_path, monkeypatch):
    true_draw, sizes = rendering.draw_batch, []

    def small_memory(pipe, settings, on_step=None):
        sizes.append(len(settings))
        if len(settings) * settings[0].width > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        return true_draw(pipe, settings, on_step)

    monkeypatch.setattr(rendering, "draw_batch", small_memory)
    text = "".join(f"a {k} --d {k}\n" for k in range(10)) + "wide --w 64\n"
    result = batch(text, "--batch-size", 8)
    assert result.code == 3
    assert sizes[:7] == [8, 4, 2, 2, 4, 2, 2]
    assert sizes[7:] == [2, 1]
    assert {r["status"] for r in records(tmp_path / "out") if r["width"] == 16} == {"done"}
    (wide,) = (r for r in records(tmp_path / "out") if r["width"] == 64)
    assert wide["error"] == "not enough memory for 64x16 pixels"
    assert runner.is_out_of_memory(MemoryError())


class Card:
    """The memory of a GPU on which a picture needs ``each`` bytes beside a model of 50."""

    def __init__(self, total: int, each: int) -> None:
        self.total, self.each, self.count = total, each, 0

    def used(self) -> int:
        return 50

    def peak(self) -> int:
        return 50 + self.each * self.count

    def reset_peak(self) -> None:
        self.count = 0

    def free(self) -> int:
        return self.total - 50


@pytest.mark.parametrize(("total", "largest"), [(10_050, 850), (1_050, 85), (10**9, 4096), (60, 1)])
def test_automatic_batches_grow_to_the_most_that_fit(total, largest):
    card = Card(total, 10)
    batches, left, drawn = BatchSizes(None, card), 10_000, []
    while left:
        size = batches.choose(64, 64, left)
        if 50 + size * 10 > total:  # only the first can be too large: nothing is known yet
            assert not drawn
            batches.shrink(64, 64, size)
            continue
        with batches.observe(64, 64, size):
            card.count = size
        drawn.append(size)
        left -= size
    assert max(drawn) == pytest.approx(min(largest, 2500), rel=0.06)
    if largest >= 32:
        assert max(drawn[:5]) > 0.9 * min(largest, 2000)  # quickly
        assert drawn[-1] <= 32  # little is left to encode when the last one is drawn
    wide = BatchSizes(None, Card(10**9, 10))
    assert wide.choose(4096, 4096, 100) == 1  # 2**24 pixels at once are enough


def test_memory_that_ends_stops_growing():
    batches = BatchSizes(None, Card(10**9, 1))
    with batches.observe(64, 64, 8):
        pass
    assert batches.choose(64, 64, 1000) > 32
    assert batches.shrink(64, 64, 64) == 32
    with batches.observe(64, 64, 32):
        pass
    assert batches.choose(64, 64, 1000) == 32
    assert batches.choose(32, 32, 1000) == 8  # another size is another question


def test_numbers_become_pictures_as_in_diffusers():
    from diffusers.image_processor import VaeImageProcessor

    pixels = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    pixels[1, 0, 2, 3] = torch.nan
    drawn = rendering.Drawn(pixels, rendering.mark(pixels.device))
    images = drawn.images()
    assert images[1] is None
    assert drawn.seconds() >= 0
    expected = VaeImageProcessor.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())
    for index in (0, 2):
        assert np.array_equal(np.asarray(images[index]), np.asarray(expected[index]))


def test_a_picture_is_the_same_in_company(batch, tmp_path):
    text = "a red apple --d 1\na blue rocket --d 2 --n red\nflat --d 3\n"
    assert batch(text, "--batch-size", 3).code == 0
    together = {n: np.asarray(Image.open(tmp_path / "out" / n), int) for n in pictures(tmp_path / "out")}
    for path in list((tmp_path / "out").iterdir()):
        path.unlink()
    assert batch(text).code == 0
    for name, pixels in together.items():
        assert abs(np.asarray(Image.open(tmp_path / "out" / name), int) - pixels).max() <= 1


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_other_formats_carry_their_settings(batch, gspn2, tmp_path, ending):
    assert batch("a “red” äpple --d 5 --n 🍎", "--image-format", ending).code == 0
    path = tmp_path / "out" / f"00001-5.{ending}"
    settings = read_settings(path)
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a “red” äpple", "🍎", 5)
    with Image.open(path) as image:
        assert image.format == {"jpg": "JPEG", "webp": "WEBP"}[ending]
    assert batch("a “red” äpple --d 5 --n 🍎", "--image-format", ending, "--json").out.count("picture") == 0


def test_events(batch, tmp_path):
    result = batch("a\nb\nb --d 1 --w 18", "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert events[0]["event"] == "plan"
    assert (events[0]["total"], events[0]["skipped"]) == (3, 0)
    assert [e["count"] for e in events if e["event"] == "batch"] == [1, 1]
    assert {(e["prompt"], e["status"]) for e in events if e["event"] == "picture"} == {
        ("a", "done"),
        ("b", "done"),
        ("b", "failed"),
    }
    assert (events[-1]["done"], events[-1]["failed"], events[-1]["interrupted"]) == (2, 1, False)
    assert 0 < events[-1]["started"] <= events[-1]["ended"]


def test_standard_input(gspn2, tiny_model, tmp_path, monkeypatch):
    text = b'{"prompt": "a red apple", "seed": 3}\n{"prompt": "a", "seed": 4}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    out = tmp_path / "new" / "folder"
    assert gspn2("batch", "-", "--out", out, "--model", tiny_model, *COMMON).code == 0
    assert sorted(pictures(out)) == ["00001-3.png", "00002-4.png"]


def test_dry_run_draws_nothing(batch, tmp_path):
    result = batch("a {red|blue} apple\nb --d 3 --count 2", "--dry-run", "--name", "{prompt}-{seed}")
    plan = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 0
    assert [item["index"] for item in plan] == [1, 2, 3]
    assert plan[0]["prompt"] in ("a red apple", "a blue apple")
    assert plan[2]["file"] == "b-4.png"
    assert not (tmp_path / "out").exists()


USAGE = {
    "unknown flag": ("a --sedd 1", (), "line 1: --sedd"),
    "empty list": ("\n# nothing\n", (), "no prompt"),
    "wildcard": ("a __nothing__", (), "__nothing__"),
    "name": ("a", ("--name", "{sed}"), "--name"),
    "name outside": ("a", ("--name", "../{seed}"), "--name"),
    "image format": ("a", ("--image-format", "gif"), "'gif'"),
    "input format": ("a", ("--input-format", "xml"), "'xml'"),
    "batch size": ("a", ("--batch-size", "0"), "--batch-size"),
    "guidance": ("a", ("--guidance", "nan"), "--guidance"),
    "wildcards folder": ("a", ("--wildcards", "/none"), "--wildcards"),
    "device": ("a", ("--device", "tpu"), "'tpu'"),
    "dtype": ("a", ("--dtype", "int8"), "'int8'"),
    "seeds": ("a", ("--seed", 2**63 - 1, "--count", 2), "passes"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(batch, tmp_path, case):
    text, more, complaint = USAGE[case]
    result = batch(text, *more)
    assert (result.code, len(result.error_lines), result.out) == (2, 1, "")
    assert complaint in result.err
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_errors(batch, gspn2, tiny_model, tmp_path, monkeypatch):
    def check(result, complaint: str) -> None:
        assert (result.code, len(result.error_lines)) == (1, 1), result.err
        assert complaint in result.err

    check(gspn2("batch", tmp_path / "none.txt", "--out", tmp_path / "x"), "none.txt")
    (tmp_path / "file").touch()
    (tmp_path / "p.txt").write_text("a")
    check(gspn2("batch", tmp_path / "p.txt", "--out", tmp_path / "file"), "--out")
    check(gspn2("batch", tmp_path / "p.txt", "--out", tmp_path / "x", "--model", "./none"), "./none")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "save_picture", full)
    check(batch("a"), "No space left")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gspn2("batch", "-", "--out", tmp_path / "x").code == 2
    monkeypatch.setenv("RANK", "2")
    assert batch("a").code == 2
