"""Few steps on the command line: the default of a CPU, recorded, and redrawn with the same choice."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from tiny_models import save_with_few_steps

from gspn2_diffusion.batch.plan import picture_key
from gspn2_diffusion.cli import few_steps
from gspn2_diffusion.cli.console import CliError
from gspn2_diffusion.png_metadata import GenerationSettings, MetadataError, read_parameters, read_settings

peft = pytest.importorskip("peft", reason="needs peft: pip install 'peft>=0.17'")
NOTE = "note: on a CPU this model draws in 3 steps with its adapter (--no-few-steps: without)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with an adapter for three steps."""
    return save_with_few_steps(tmp_path_factory.mktemp("few-steps") / "tiny")


@pytest.fixture
def draw(gspn2, model, tmp_path):
    def call(name: str, *more: object):
        path = tmp_path / f"{name}.png"
        common = ("--model", model, "--device", "cpu", "--seed", 5)
        result = gspn2("generate", "a red apple", "-o", path, *common, *more)
        assert result.code == 0, result.err
        return path, result.err

    return call


def test_default_on_a_cpu_and_verified(gspn2, draw, model):
    path, told = draw("default")
    assert told.splitlines() == [NOTE]
    settings = read_settings(path)
    assert (settings.few_steps, settings.steps, settings.guidance_scale) == (True, 3, 1.0)
    assert read_parameters(path)["Few steps"] == "on"
    asked, told = draw("asked", "--few-steps", "--quiet")
    assert (asked.read_bytes(), told) == (path.read_bytes(), "")
    assert gspn2("verify", path, "--model", model).out.splitlines()[0].endswith("the same, bit for bit")
    assert json.loads(gspn2("info", path, "--json").out)["settings"]["few_steps"] is True
    plain, told = draw("plain", "--steps", 3, "--guidance", 1)
    assert (read_settings(plain).few_steps, told) == (False, "")
    assert plain.read_bytes() != path.read_bytes()
    assert gspn2("verify", plain, "--model", model).code == 0
    many, _ = draw("many", "--no-few-steps")
    assert (read_settings(many).few_steps, read_settings(many).steps) == (False, 20)
    six, _ = draw("six", "--few-steps", "--steps", 6)
    assert (read_settings(six).few_steps, read_settings(six).steps) == (True, 6)
    assert not read_settings(draw("negative", "--negative", "a hat", "--steps", 1)[0]).few_steps


def test_each_prompt_of_a_list_decides_for_itself(gspn2, draw, model, tmp_path):
    (tmp_path / "list.txt").write_text(
        "a red apple --d 5\na red apple --d 5 --s 2\na red apple --d 5 --l 1 --s 3\n"
    )
    command = ("batch", tmp_path / "list.txt", "--out", tmp_path / "out", "--model", model, "--device", "cpu")
    result = gspn2(*command)
    assert (result.code, result.err.splitlines()) == (0, [NOTE])
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    found = {line["index"]: line for line in lines}
    assert [(found[k]["few_steps"], found[k]["steps"]) for k in (1, 2, 3)] == [
        (True, 3),
        (False, 2),
        (False, 3),
    ]
    content = (tmp_path / "out" / found[1]["file"]).read_bytes()
    assert content == draw("alone")[0].read_bytes()
    assert (tmp_path / "out" / found[3]["file"]).read_bytes() == draw("other", "--guidance", 1, "--steps", 3)[
        0
    ].read_bytes()
    assert gspn2(*command).out == ""  # all are there
    planned = gspn2(*command, "--dry-run").out.splitlines()
    assert [json.loads(line)["few_steps"] for line in planned] == [None, False, False]
    planned = gspn2(*command, "--dry-run", "--few-steps").out.splitlines()
    assert [(json.loads(line)["few_steps"], json.loads(line)["steps"]) for line in planned] == [
        (True, 3),
        (True, 2),
        (True, 3),
    ]


def test_a_model_without_one(gspn2, tiny_model, tmp_path):
    for command in (("generate", "a", "-o", tmp_path / "x.png"), ("batch", "-", "--out", tmp_path / "out")):
        result = gspn2(*command, "--model", tiny_model, "--few-steps")
        assert (result.code, len(result.error_lines)) == (1, 1)
        assert "this model has no few-step adapter" in result.err


def test_what_decides(capsys, monkeypatch):
    config = {"few_steps": 4}
    assert few_steps.choose(None, False, config, "cpu", quiet=True)
    assert not few_steps.choose(None, False, config, "cuda", quiet=False)
    assert not few_steps.choose(None, True, config, "cpu", quiet=False)
    assert not few_steps.choose(None, False, {}, "cpu", quiet=False)
    assert few_steps.choose(True, True, config, "cuda", quiet=False)
    assert not few_steps.choose(False, False, config, "cpu", quiet=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    monkeypatch.setattr(sys, "path", [])
    assert not few_steps.choose(None, False, config, "cpu", quiet=False)
    assert "pip install 'peft>=0.17'" in capsys.readouterr().err
    with pytest.raises(CliError, match="--few-steps needs another package"):
        few_steps.check(True, config)


def test_older_records_mean_without(draw):
    settings = read_settings(draw("older", "--steps", 1)[0])
    text = settings.to_json()
    assert GenerationSettings.from_json(text.replace('"few_steps": false, ', "")) == settings
    with pytest.raises(MetadataError, match="few_steps"):
        GenerationSettings.from_json(text.replace('"few_steps": false', '"few_steps": 1'))
    with pytest.raises(MetadataError, match="steps"):
        GenerationSettings.from_json(text.replace('"steps": 1,', '"steps": true,'))
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k != "few_steps"}
    assert picture_key(settings) == picture_key(GenerationSettings(**values))
    assert picture_key(dataclasses.replace(settings, few_steps=True)) != picture_key(settings)
