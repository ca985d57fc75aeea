"""``gspn2 info`` on pictures of three programs, ``gspn2 verify`` on whole, changed and foreign pictures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from bad_pictures import png_of_size
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gspn2_diffusion.cli import verify
from gspn2_diffusion.cli.foreign import parse_comfyui
from gspn2_diffusion.png_metadata import read_settings, save_picture, save_png

A1111 = (
    "cat, <lora:fur:0.8>\nNegative prompt: dog\n"
    "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 12, Size: 512x768, Model: dream_8"
)
COMFYUI = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": ["9", 0],
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a galaxy in a bottle", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "watermark", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "PrimitiveInt", "inputs": {"value": 156680208700286}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "fur", "model": ["4", 0], "clip": ["4", 1]}},
}
READ = {
    "Prompt": "a galaxy in a bottle",
    "Negative prompt": "watermark",
    "Seed": "156680208700286",
    "Steps": "20",
    "CFG scale": "8.0",
    "Sampler": "euler",
    "Schedule type": "normal",
    "Denoising strength": "1.0",
    "Size": "512x768",
    "Model": "v1-5.safetensors",
}


def with_text(path, **texts: str):
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.fixture
def ours(gspn2, tiny_model, tmp_path):
    path = tmp_path / "ours.png"
    more = ("--model", tiny_model, "--steps", 2, "--seed", 7, "--device", "cpu", "--negative", "blue")
    assert gspn2("generate", "a red apple", "-o", path, *more).code == 0
    return path


def test_info_of_ours(gspn2, ours):
    shown = json.loads(gspn2("info", ours, "--json").out)
    assert shown == {"program": "gspn2", "settings": dataclasses.asdict(read_settings(ours))}
    text = gspn2("info", ours).out
    assert "made by:" in text
    assert any(line.split() == ["seed:", "7"] for line in text.splitlines())


def test_info_of_others(gspn2, tmp_path):
    shown = json.loads(gspn2("info", with_text(tmp_path / "a.png", parameters=A1111), "--json").out)
    assert shown["program"] == "A1111"
    assert (shown["settings"]["Negative prompt"], shown["settings"]["Seed"]) == ("dog", "12")
    comfy = with_text(tmp_path / "c.png", prompt=json.dumps(COMFYUI), workflow="{}")
    assert json.loads(gspn2("info", comfy, "--json").out) == {"program": "ComfyUI", "settings": READ}
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert json.loads(gspn2("info", tmp_path / "a.jpg", "--json").out) == shown


@pytest.mark.parametrize("text", ["{", "[]", '{"1": 2}', '{"1": {"inputs": {"text": "a"}}}'])
def test_graphs_that_cannot_be_read(gspn2, tmp_path, text):
    with pytest.raises(ValueError, match=r"graph|JSON|property|value"):
        parse_comfyui(text)
    result = gspn2("info", with_text(tmp_path / "c.png", prompt=text))
    assert (result.code, len(result.error_lines)) == (1, 1)


def test_a_graph_that_goes_in_circles():
    inputs = {"positive": ["1", 0], "negative": ["1", 0], "latent_image": ["2", 0], "model": ["gone", 0]}
    assert parse_comfyui(json.dumps({"1": {"inputs": inputs}})) == {"Prompt": "", "Negative prompt": ""}


def test_info_of_nothing(gspn2, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for path in (with_text(tmp_path / "plain.png"), tmp_path / "text.png", tmp_path / "none.png", tmp_path):
        result = gspn2("info", path)
        assert (result.code, len(result.error_lines), result.out) == (1, 1, "")
        assert str(path) in result.err
    assert gspn2("info").code == 2


def test_info_of_a_picture_that_is_too_large(gspn2, tmp_path, monkeypatch):
    """Pillow's limit is 178 megapixels; more would be decoded before any text is found."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**30 // 12)  # a server in this process has set its own
    path = tmp_path / "large.png"
    path.write_bytes(png_of_size(15_000, 13_000))
    result = gspn2("info", path)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {str(path)!r} is not opened: it says it has more than 178 megapixels\n"


def test_verify_the_same(gspn2, ours, tiny_model):
    result = gspn2("verify", ours, "--model", tiny_model)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{ours}: the same, bit for bit\n"


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_verify_lossy_files_bit_for_bit(gspn2, ours, tiny_model, ending):
    path = ours.with_suffix(f".{ending}")
    with Image.open(ours) as image:
        save_picture(image.convert("RGB"), path, read_settings(ours))
    result = gspn2("verify", path, "--model", tiny_model, "--json")
    assert json.loads(result.out)["bitwise"] is True


def test_verify_names_what_differs(gspn2, ours, tiny_model, tmp_path):
    settings = read_settings(ours)
    with Image.open(ours) as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0] ^= 1
    nearly = Image.fromarray(pixels)
    changed = Image.fromarray(255 - pixels)

    def check(image, code: int, **changes):
        path = save_png(image, tmp_path / "x.png", dataclasses.replace(settings, **changes))
        result = gspn2("verify", path, "--model", tiny_model, "--json")
        assert result.code == code, result.err
        return json.loads(result.out)

    near = check(nearly, 0)
    assert (near["same"], near["bitwise"], near["max"], near["differs"]) == (True, False, 1, {})
    far = check(changed, 3)
    assert (far["same"], far["differs"]) == (False, {})
    assert "was changed" in gspn2("verify", tmp_path / "x.png", "--model", tiny_model).out
    other = {"model_hash": "f" * 64, "versions": {**settings.versions, "torch": "2.0"}, "device_name": "H100"}
    differs = check(changed, 3, **other)["differs"]
    assert set(differs) == {"model", "torch", "device"}
    assert differs["torch"] == ["2.0", settings.versions["torch"]]
    assert check(changed.resize((8, 8)), 3)["mean"] is None


def test_verify_errors(gspn2, ours, tmp_path):
    for command, code in (
        (("verify", ours), 1),  # its model was a folder
        (("verify", with_text(tmp_path / "plain.png")), 1),
        (("verify", tmp_path / "none.png"), 1),
        (("verify", ours, "--device", "tpu"), 2),
        (("verify", ours, "--tolerance", "nan"), 2),
        (("verify",), 2),
    ):
        result = gspn2(*command)
        assert (result.code, len(result.error_lines), result.out) == (code, 1, ""), command


def test_tolerance():
    zeros = np.zeros((2, 2, 3), np.uint8)
    assert verify.compare(zeros, zeros + np.uint8(2), 1.9)["same"] is False
    assert verify.compare(zeros, zeros + np.uint8(2), 2.0) == {
        "same": True,
        "bitwise": False,
        "mean": 2.0,
        "max": 2,
    }
