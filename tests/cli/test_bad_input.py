"""Every wrong command line: its exit code, one line on stderr that names the fault, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspn2_diffusion import __version__

USAGE = {
    "no command": (["draw"], "draw"),
    "no prompt": (["generate", "-o", "x.png"], "PROMPT"),
    "no output": (["generate", "a cat"], "--output"),
    "two prompts": (["generate", "a cat", "a dog", "-o", "x.png"], "a dog"),
    "unknown option": (["generate", "a cat", "-o", "x.png", "--sedd", "1"], "--sedd"),
    "empty prompt": (["generate", " ", "-o", "x.png"], "PROMPT"),
    "undecodable prompt": (["generate", "a \udcff cat", "-o", "x.png"], "PROMPT"),
    "undecodable negative": (["generate", "a", "-o", "x.png", "--negative", "\udcff"], "--negative"),
    "jpeg": (["generate", "a cat", "-o", "x.jpg"], "'x.jpg'"),
    "no extension": (["generate", "a cat", "-o", "x"], ".png"),
    "steps 0": (["generate", "a cat", "-o", "x.png", "--steps", "0"], "--steps"),
    "steps word": (["generate", "a cat", "-o", "x.png", "--steps", "many"], "--steps"),
    "guidance nan": (["generate", "a cat", "-o", "x.png", "--guidance", "nan"], "--guidance"),
    "guidance negative": (["generate", "a cat", "-o", "x.png", "--guidance", "-1"], "--guidance"),
    "seed negative": (["generate", "a cat", "-o", "x.png", "--seed", "-1"], "--seed"),
    "seed too large": (["generate", "a", "-o", "x.png", "--seed", str(2**63)], "--seed"),
    "last seed too large": (["generate", "a", "-o", "x.png", "--seed", str(2**63 - 1), "-n", "2"], "--count"),
    "count 0": (["generate", "a cat", "-o", "x.png", "--count", "0"], "--count"),
    "height 0": (["generate", "a cat", "-o", "x.png", "--height", "0"], "--height"),
    "width word": (["generate", "a cat", "-o", "x.png", "--width", "wide"], "--width"),
    "device": (["generate", "a cat", "-o", "x.png", "--device", "tpu"], "'tpu'"),
    "device index": (["generate", "a cat", "-o", "x.png", "--device", "cuda:x"], "'cuda:x'"),
    "dtype": (["generate", "a cat", "-o", "x.png", "--dtype", "int8"], "'int8'"),
    "doctor option": (["doctor", "--jsn"], "--jsn"),
}


def check(result, code: int, text: str) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert len(result.error_lines) == 1, result.err
    assert result.err.startswith("error: ")
    assert text.lower() in result.err.lower()  # typer writes PROMPT or prompt, depending on its version


@pytest.mark.parametrize("name", USAGE)
def test_usage(gspn2, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command, text = USAGE[name]
    check(gspn2(*command), 2, text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--height", "--width"])
def test_size_that_the_model_cannot_draw(gspn2, tiny_model, tmp_path, option):
    result = gspn2("generate", "a", "-o", tmp_path / "x.png", "--model", tiny_model, option, 18)
    check(result, 2, f"{option} must be a multiple of 4 for this model, got 18")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written(gspn2, tmp_path, monkeypatch):
    """Found before the model is looked for, so nobody waits for a picture that has nowhere to go."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder.png", Path("/proc/none/x.png")):
        check(gspn2("generate", "a", "-o", path, "--model", "./none"), 1, f"--output '{path}'")
    locked = tmp_path / "locked.png"
    locked.write_text("keep")
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write anything
    check(gspn2("generate", "a", "-o", locked, "--model", "./none"), 1, "write-protected")
    assert locked.read_text() == "keep"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_device_that_is_not_there(gspn2, tiny_model, tmp_path, device):
    result = gspn2("generate", "a", "-o", tmp_path / "x.png", "--model", tiny_model, "--device", device)
    check(result, 1, f"--device {device}")


def copy_model(tiny_model: Path, target: Path) -> Path:
    return Path(shutil.copytree(tiny_model, target / "model"))


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def break_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def break_weights(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def break_weights_missing(folder: Path) -> None:
    next((folder / "transformer").glob("*.safetensors")).unlink()


def break_config(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 3}))


def break_class(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": ["diffusers", "NoScheduler"]}))


@pytest.mark.parametrize(
    "damage",
    [
        break_nothing_there,
        break_no_index,
        break_index,
        break_component,
        break_weights,
        break_weights_missing,
        break_config,
        break_class,
    ],
)
def test_damaged_models(gspn2, tiny_model, tmp_path, damage):
    folder = copy_model(tiny_model, tmp_path)
    damage(folder)
    result = gspn2("generate", "a", "-o", tmp_path / "x.png", "--model", folder)
    check(result, 1, "--model")
    assert not (tmp_path / "x.png").exists()


def test_help_and_version(gspn2):
    for command in ((), ("--help",)):
        result = gspn2(*command)
        assert (result.code, result.err) == (0, "")
        assert "generate" in result.out
        assert "doctor" in result.out
    options = (
        "--output --model --steps --guidance --seed --height --width --count --negative --device --dtype"
    )
    text = gspn2("generate", "--help").out
    assert [option for option in options.split() if option not in text] == []
    assert gspn2("--version").out == f"gspn2-diffusion {__version__}\n"


@pytest.mark.parametrize("command", [["--help"], ["generate", "a cat", "-o", "x.jpg"]])
def test_help_and_usage_errors_do_not_wait_for_torch(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gspn2_diffusion", *command],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, 2)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "gspn2_diffusion.cli.generate" in imported
    assert {"torch", "diffusers", "transformers", "numpy", "PIL", "cupy"} & imported == set()
