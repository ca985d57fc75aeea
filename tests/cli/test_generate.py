from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.cli import defaults, generate
from gspn2_diffusion.files import model_hash
from gspn2_diffusion.pipelines.model_folders import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.png_metadata import read_parameters, read_settings

PROMPT = "a red apple, flat style"
LONG = "a red apple on a blue background " * 4


def arguments(model: Path, output: Path, *more: object) -> list[object]:
    return ["generate", PROMPT, "-o", output, "--model", model, "--steps", 2, "--seed", 7, *more]


def test_same_command_same_bytes(gspn2, tiny_model, tmp_path):
    for name in ("one.png", "two.png"):
        result = gspn2(*arguments(tiny_model, tmp_path / name))
        assert (result.code, result.err) == (0, "")
        assert result.out == f"{tmp_path / name}\n"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_bar_in_a_pipe_even_where_colours_are_wanted(gspn2, tiny_model, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert gspn2(*arguments(tiny_model, tmp_path / "out.png")).err == ""


def test_settings_in_the_file_are_resolved(gspn2, tiny_model, tmp_path):
    path = tmp_path / "out.png"
    more = ("--negative", "blue, “dots”", "--height", 8, "--width", 24, "--guidance", 2.5)
    assert gspn2(*arguments(tiny_model, path, *more)).code == 0
    settings = read_settings(path)
    assert (settings.prompt, settings.negative_prompt) == (PROMPT, "blue, “dots”")
    assert (settings.steps, settings.guidance_scale, settings.seed) == (2, 2.5, 7)
    assert (settings.height, settings.width) == (8, 24)
    assert (settings.model, settings.model_hash) == ("tiny", model_hash(tiny_model))
    assert settings.scheduler == "FlowMatchEulerDiscreteScheduler"
    assert settings.scheduler_config["num_train_timesteps"] == 1000
    assert settings.dtype == "float32" or torch.cuda.is_available()
    assert settings.versions["torch"] in (torch.__version__, torch.__version__.split("+")[0])  # from PyPI
    assert str(tiny_model.parent) not in settings.to_json()
    assert read_parameters(path)["Size"] == "24x8"
    with Image.open(path) as image:
        assert image.size == (24, 8)


def test_picture_is_what_the_pipeline_draws(gspn2, tiny_model, tmp_path):
    path = tmp_path / "out.png"
    assert gspn2(*arguments(tiny_model, path, "--device", "cpu")).code == 0
    # Loaded as well: weights at other places of the memory may give sums another order.
    pipe = GSPN2Pipeline.from_pretrained(str(tiny_model))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = pipe(
        PROMPT, num_inference_steps=2, guidance_scale=DEFAULT_GUIDANCE_SCALE, generator=generator
    ).images[0]
    with Image.open(path) as image:
        assert image.tobytes() == expected.tobytes()


def test_every_option_changes_the_picture(gspn2, tiny_model, tmp_path):
    changes = {
        "plain": (),
        "seed": ("--seed", 8),
        "steps": ("--steps", 3),
        "guidance": ("--guidance", 9),
        "negative": ("--negative", "blue rocket"),
        "dtype": ("--dtype", "bf16"),
    }
    pixels = {}
    for name, more in changes.items():
        assert gspn2(*arguments(tiny_model, tmp_path / f"{name}.png", "--device", "cpu", *more)).code == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels[name] = image.tobytes()
    assert len(set(pixels.values())) == len(changes)


def test_count_gives_the_pictures_of_single_runs(gspn2, tiny_model, tmp_path):
    result = gspn2(*arguments(tiny_model, tmp_path / "out.png", "--count", 3))
    names = ["out-0001.png", "out-0002.png", "out-0003.png"]
    assert result.code == 0
    assert result.out.splitlines() == [str(tmp_path / name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [read_settings(tmp_path / name).seed for name in names] == [7, 8, 9]
    assert gspn2(*arguments(tiny_model, tmp_path / "single.png", "--seed", 9)).code == 0
    assert (tmp_path / "single.png").read_bytes() == (tmp_path / names[2]).read_bytes()


def test_random_seed_is_recorded_and_reproduces(gspn2, tiny_model, tmp_path):
    common = ("--model", tiny_model, "--steps", 1)
    for name in ("a.png", "b.png"):
        assert gspn2("generate", PROMPT, "-o", tmp_path / name, *common).code == 0
    seed, other = (read_settings(tmp_path / name).seed for name in ("a.png", "b.png"))
    assert seed != other
    assert gspn2("generate", PROMPT, "-o", tmp_path / "c.png", *common, "--seed", seed).code == 0
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_folders_are_made_and_files_replaced(gspn2, tiny_model, tmp_path):
    path = tmp_path / "new" / "folder" / "out.PNG"
    for seed in (1, 2):
        assert gspn2(*arguments(tiny_model, path, "--seed", seed)).code == 0
    assert read_settings(path).seed == 2
    assert [item.name for item in path.parent.iterdir()] == ["out.PNG"]


def test_long_prompt_warns_once_in_one_line(gspn2, tiny_model, tmp_path):
    more = ("--model", tiny_model, "--steps", 1, "--count", 2, "--quiet")
    result = gspn2("generate", LONG, "-o", tmp_path / "out.png", *more)
    assert (result.code, result.out) == (0, "")
    assert len(result.error_lines) == 1
    assert result.err.startswith("warning: ")
    assert "dropped" in result.err


def test_defaults_are_those_of_the_pipeline():
    parameters = inspect.signature(GSPN2Pipeline.__call__).parameters
    assert parameters["num_inference_steps"].default is None
    assert parameters["guidance_scale"].default is None
    assert (DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE) == (20, 4.0)  # as --help says


def test_a_model_folder_may_have_its_own_steps_and_guidance(gspn2, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "few"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"default_steps": 3, "default_guidance_scale": 1.0})
    )
    path = tmp_path / "out.png"
    assert gspn2("generate", PROMPT, "-o", path, "--model", folder, "--seed", 7).code == 0
    found = read_settings(path)
    assert (found.steps, found.guidance_scale) == (3, 1.0)
    assert defaults.sampling(str(folder), 5, None) == (5, 1.0)
    assert defaults.sampling(str(tmp_path / "nothing"), None, None) == (20, 4.0)
    assert defaults.sampling("gspn2-emoji", None, 2.0) == (20, 2.0)


def test_values_that_are_not_numbers_are_refused(gspn2, tmp_path):
    pipe = build_tiny_pipeline()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "model")
    result = gspn2(*arguments(tmp_path / "model", tmp_path / "out.png"))
    assert result.code == 1
    assert len(result.error_lines) == 1
    assert "not numbers" in result.err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), 1, "not enough memory for 16x16"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines"),
    ],
)
def test_failures_while_drawing(gspn2, tiny_model, tmp_path, monkeypatch, raised, code, text):
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(generate, "render", fail)
    result = gspn2(*arguments(tiny_model, tmp_path / "out.png"))
    assert (result.code, len(result.error_lines)) == (code, 1)
    assert text in result.err
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(gspn2, tmp_path, monkeypatch):
    command = ("generate", PROMPT, "-o", tmp_path / "out.png", "--model", tmp_path / "none")
    assert "Traceback" not in gspn2(*command).err
    assert "Traceback" in gspn2(*command, "--debug").err
    monkeypatch.setenv("GSPN2_DEBUG", "1")
    assert "Traceback" in gspn2(*command).err


def test_as_a_program(gspn2, tiny_model, tmp_path):
    """A fresh process: nothing but the file's name on the screen, and the same picture as in this one."""
    assert gspn2(*arguments(tiny_model, tmp_path / "here.png", "--device", "cpu")).code == 0
    command = [str(item) for item in arguments(tiny_model, tmp_path / "there.png", "--device", "cpu")]
    environment = {key: value for key, value in os.environ.items() if key != "GSPN2_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-m", "gspn2_diffusion", *command],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'there.png'}\n"
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
