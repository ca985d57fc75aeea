from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gspn2_diffusion.png_metadata import (
    GenerationSettings,
    MetadataError,
    format_parameters,
    parse_parameters,
    read_parameters,
    read_settings,
    read_text,
    save_png,
)

SETTINGS = GenerationSettings(
    prompt="a red apple",
    negative_prompt="",
    steps=20,
    guidance_scale=4.5,
    seed=2**63 - 1,
    height=256,
    width=128,
    model="gspn2-emoji",
    model_hash="0123456789abcdef" * 4,
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_config={"shift": 3.0, "use_dynamic_shifting": False, "terminal": None},
    versions={"gspn2-diffusion": "0.1.0", "torch": "2.13.0"},
)
PROMPTS = {
    "plain": "a red apple",
    "commas and quotes": "a \"red\", 'round' apple\\, Steps: 3, (shiny:1.2)",
    "lines": "a red apple\n\non a table\n",
    "looks like settings": "apple\nNegative prompt: pear\nSteps: 1, Seed: 2, Size: 3x4",
    "unicode": "🍎 ein Äpfelchen, リンゴ, تفاحة",
    "control characters": "a\ttab and \x7f and \x01",
    "empty": "",
    "very long": "a red apple 🍎 " * 4000,
}


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (4, 3), (200, 30, 30))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "model"])
def test_settings_round_trip(image, tmp_path, name, field):
    settings = dataclasses.replace(SETTINGS, **{field: PROMPTS[name]})
    path = save_png(image, tmp_path / "x.png", settings)
    assert read_settings(path) == settings
    assert read_text(path)["parameters"] == format_parameters(settings)
    with Image.open(path) as saved:
        assert saved.tobytes() == image.tobytes()


def test_bytes_depend_on_picture_and_settings_only(image, tmp_path):
    first = save_png(image, tmp_path / "x.png", SETTINGS).read_bytes()
    assert save_png(image, tmp_path / "y.png", SETTINGS).read_bytes() == first
    assert save_png(image, tmp_path / "z.png", dataclasses.replace(SETTINGS, seed=1)).read_bytes() != first


def test_parameters_text():
    settings = dataclasses.replace(SETTINGS, negative_prompt="blurry", model="a, b")
    assert format_parameters(settings) == (
        "a red apple\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: FlowMatchEulerDiscreteScheduler, CFG scale: 4.5, Seed: 9223372036854775807, "
        'Size: 128x256, Model hash: 0123456789, Model: "a, b", Version: gspn2-diffusion 0.1.0'
    )
    assert "Negative prompt" not in format_parameters(SETTINGS)


@pytest.mark.parametrize("name", ["plain", "commas and quotes", "unicode", "very long"])
def test_parameters_round_trip(image, tmp_path, name):
    settings = dataclasses.replace(
        SETTINGS, prompt=PROMPTS[name], negative_prompt="one\ntwo, three", model='a "b", c:d'
    )
    values = read_parameters(save_png(image, tmp_path / "x.png", settings))
    assert values["Prompt"] == PROMPTS[name]
    assert values["Negative prompt"] == "one\ntwo, three"
    assert values["Seed"] == str(settings.seed)
    assert values["Model"] == 'a "b", c:d'


def test_parameters_of_the_web_ui():
    values = parse_parameters(
        "cat, <lora:fur:0.8>\nsecond line\nNegative prompt: dog,\nbird\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 12, Size: 512x768, Model: dream_8, "
        'Lora hashes: "fur: ab12, x: cd", Version: v1.6.0'
    )
    assert values["Prompt"] == "cat, <lora:fur:0.8>\nsecond line"
    assert values["Negative prompt"] == "dog,\nbird"
    assert (values["Sampler"], values["Size"]) == ("DPM++ 2M Karras", "512x768")
    assert values["Lora hashes"] == "fur: ab12, x: cd"
    assert parse_parameters("note: just a prompt") == {"Prompt": "note: just a prompt", "Negative prompt": ""}


def save_with(image: Image.Image, path, text: str) -> None:
    info = PngInfo()
    info.add_itxt("gspn2", text)
    image.save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "list"),
        ("{}", "'prompt'"),
        (json.dumps({**dataclasses.asdict(SETTINGS), "steps": "20"}), "'steps'"),
        (json.dumps({**dataclasses.asdict(SETTINGS), "steps": True}), "'steps'"),
        (json.dumps({**dataclasses.asdict(SETTINGS), "seed": None}), "'seed'"),
    ],
)
def test_damaged_settings(image, tmp_path, text, complaint):
    save_with(image, tmp_path / "x.png", text)
    with pytest.raises(MetadataError, match=complaint):
        read_settings(tmp_path / "x.png")


def test_unknown_keys_are_ignored(image, tmp_path):
    save_with(image, tmp_path / "x.png", json.dumps({**dataclasses.asdict(SETTINGS), "loras": []}))
    assert read_settings(tmp_path / "x.png") == SETTINGS


def test_other_files(image, tmp_path):
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    whole = save_png(image.resize((300, 300)), tmp_path / "whole.png", SETTINGS).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:200])
    for name in ("plain.png", "photo.jpg", "text.png", "cut.png"):
        with pytest.raises(MetadataError, match=name):
            read_settings(tmp_path / name)
        with pytest.raises(MetadataError, match=name):
            read_parameters(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_settings(tmp_path / "none.png")


def test_failed_save_keeps_the_old_file(image, tmp_path, monkeypatch):
    path = save_png(image, tmp_path / "x.png", SETTINGS)
    before = path.read_bytes()

    def fail(self: Image.Image, file: object, **_: object) -> None:
        with open(file, "wb") as half:  # type: ignore[call-overload]
            half.write(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(image, path, SETTINGS)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["x.png"]
