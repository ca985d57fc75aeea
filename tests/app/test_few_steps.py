"""The page's few steps: the default of a CPU, the same picture as the command line's, and back to many."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn2_diffusion.cli import run
from gspn2_diffusion.png_metadata import read_settings
from gspn2_diffusion.webapp.engine import Engine, Finished
from gspn2_diffusion.webapp.handlers import FORM, App
from gspn2_diffusion.webapp.limits import DrawRequest, Limits
from gspn2_diffusion.webapp.records import Record, details_html
from gspn2_diffusion.webapp.restore import from_settings
from gspn2_diffusion.webapp.shelf import build_shelf

pytest.importorskip("peft", reason="needs peft: pip install 'peft>=0.17'")
FEW = DrawRequest("a red apple", "", 32, 16, 3, 1.0, "euler", 5, 1, few_steps=True)
VALUES: dict[str, Any] = {**dict.fromkeys(FORM, ""), "prompt": "a red apple", "width": 32, "height": 16}
VALUES |= {"steps": 3, "guidance_scale": 1.0, "scheduler": "euler", "seed": 5, "count": 1, "lora_weight": 1.0}


@pytest.fixture(scope="module")
def app(tiny_model: Path, other_model: Path) -> Iterator[App]:
    shelf = build_shelf([str(other_model), str(tiny_model)])
    engine = Engine(shelf, "cpu", "float32", longest_line=3)
    engine.load_in_background()
    assert engine.wait(600)
    app = App(engine, Limits(side=64, min_side=16))
    yield app
    app.close()


def draw(app: App, request: DrawRequest) -> Finished:
    finished = list(app.engine.draw(request, threading.Event()))[-1]
    assert isinstance(finished, Finished)
    return finished


def test_same_picture_as_the_command_line_and_back(app: App, other_model: Path, tmp_path: Path) -> None:
    many = dataclasses.replace(FEW, few_steps=False)
    before, few, after = (draw(app, wish) for wish in (many, FEW, many))
    path = tmp_path / "cli.png"
    options = ["--width=32", "--height=16", "--seed=5", "--few-steps", "-q", "--device=cpu"]
    assert run(["generate", "a red apple", "-o", str(path), "-m", str(other_model), *options]) == 0
    assert np.array_equal(np.asarray(few.picture), np.asarray(Image.open(path)))
    assert few.settings == read_settings(path)
    assert np.array_equal(np.asarray(before.picture), np.asarray(after.picture))
    assert not np.array_equal(np.asarray(before.picture), np.asarray(few.picture))
    assert not after.settings.few_steps


def test_a_cpu_starts_with_few_steps(app: App, tiny_model: Path) -> None:
    assert app.starts_with_few_steps
    assert app.shelf.sampling("", few_steps=True) == (3, 1.0)
    without = Engine(build_shelf([str(tiny_model)]), "cpu", "float32", longest_line=3)
    assert not App(without, Limits()).starts_with_few_steps
    without.close()


def test_models_without_the_adapter_draw_without_it(app: App) -> None:
    assert app.request(**{**VALUES, "few_steps": True}).few_steps
    assert not app.request(**VALUES).few_steps
    assert not app.request(**{**VALUES, "few_steps": True, "model": "tiny"}).few_steps


def test_settings_are_taken_over(app: App) -> None:
    found = from_settings(draw(app, FEW).settings)
    values, notes = app.form_values(found, VALUES)
    assert (values["few_steps"], values["steps"], notes) == (True, 3, [])
    elsewhere = dataclasses.replace(found, model="tiny", model_hash="")
    values, notes = app.form_values(elsewhere, VALUES)
    assert (values["few_steps"], notes) == (False, ["this model has no few-step adapter"])
    unsaid = dataclasses.replace(found, few_steps=None)
    assert app.form_values(unsaid, {**VALUES, "few_steps": True})[0]["few_steps"] is True


def test_enlarging_takes_many_steps(app: App) -> None:
    record = next(item for item in app.draw("visitor", FEW) if isinstance(item, Record))
    assert "3, with the few-step adapter" in details_html(record)
    larger = app.enlarged(record)
    assert (larger.few_steps, larger.steps, larger.guidance_scale) == (False, 20, 4.0)
    assert (larger.width, larger.height) == (64, 32)
