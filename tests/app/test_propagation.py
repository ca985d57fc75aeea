"""What the propagation panel shows is what the model does: linear, in its direction, at the right step."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.ops.line_scan import line_scan
from gspn2_diffusion.webapp.engine import Engine, Finished, Looked
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import DrawRequest
from gspn2_diffusion.webapp.propagation import Recorder, display_size, influence, overlay, scan_layers

GRID = (4, 6)
REQUEST = DrawRequest("a red apple", "blue", 24, 16, 3, 2.0, "euler", 5, 1)


@pytest.fixture(scope="module")
def recorded() -> tuple[Any, Recorder]:
    pipe, recorder = build_tiny_pipeline(), Recorder()
    pipe.set_progress_bar_config(disable=True)
    with recorder.watch(pipe.transformer):
        pipe(
            "a red apple",
            num_inference_steps=3,
            height=16,
            width=24,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
    assert (recorder.calls, recorder.grid) == (3, GRID)
    return pipe, recorder


def test_points_together_send_all_that_arrives(recorded: tuple[Any, Recorder]) -> None:
    """The scan is linear in what it carries, so that single points add up to the mixer's output."""
    pipe, recorder = recorded
    mixer, proxy = scan_layers(pipe.transformer)[1], recorder.proxies[2][1]
    outputs: list[torch.Tensor] = []
    handle = mixer.to_out.register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    total = torch.zeros(1)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            outputs.clear()
            influence(mixer, proxy, GRID, (row, column))
            bias, whole, *single = outputs
            total = total + (whole - bias)
            parts = sum(part - bias for part in single)
            assert torch.allclose(parts, whole - bias, atol=1e-5)
    handle.remove()
    with torch.no_grad():
        lam, u, weight = mixer._split_scan(mixer.to_scan(proxy[None]), *GRID)
        y = line_scan(proxy[None].unflatten(1, GRID), weight, lam, u, directions=mixer.directions)
        arrived = mixer.to_out(y.flatten(3)) - mixer.to_out(torch.zeros_like(y).flatten(3))
    assert torch.allclose(total, arrived, atol=1e-4)


@pytest.mark.parametrize("point", [(0, 0), (2, 3), (3, 5)])
def test_directions_stay_in_their_cones(recorded: tuple[Any, Recorder], point: tuple[int, int]) -> None:
    pipe, recorder = recorded
    found = influence(scan_layers(pipe.transformer)[0], recorder.proxies[0][0], GRID, point)
    rows, columns = np.indices(GRID)
    down, across = rows - point[0], columns - point[1]
    cones = {
        "down": (down >= 0) & (abs(across) <= down),
        "up": (down <= 0) & (abs(across) <= -down),
        "right": (across >= 0) & (abs(down) <= across),
        "left": (across <= 0) & (abs(down) <= -across),
    }
    for direction, cone in cones.items():
        assert (found.maps[direction][~cone] == 0).all()
        assert (found.maps[direction][cone] > 0).all()
    reach = {direction: found.reach(direction) for direction in found.maps}
    assert (reach["up"] == 0) == (point[0] == 0)
    assert 0 < reach["all"] < np.hypot(*GRID)


def look(engine: Engine, request: DrawRequest, layer: int, step: float, point: tuple[float, float]) -> Looked:
    event = list(engine.look(request, layer, step, point, threading.Event()))[-1]
    assert isinstance(event, Looked)
    return event


def test_engine_looks_into_the_picture_that_it_drew(engine: Engine) -> None:
    """Also for a guided call of several steps: the half with the prompt, at the step that was asked for."""
    pipe, seen = engine._loaded.pipe, []  # type: ignore[union-attr]
    mixer = pipe.transformer.transformer_blocks[1].mixer
    handle = mixer.to_proxy.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    event = list(engine.draw(REQUEST, threading.Event()))[-1]
    handle.remove()
    assert isinstance(event, Finished)
    assert [tuple(proxy.shape[:2]) for proxy in seen] == [(2, 24)] * 3
    looked = look(engine, REQUEST, 1, 0.5, (0.6, 0.3))
    assert (looked.call, looked.calls, looked.layer, looked.influence.point) == (1, 3, 1, (1, 3))
    expected = influence(mixer, seen[1][1], GRID, (1, 3))
    for direction, shown in looked.influence.maps.items():
        assert np.array_equal(shown, expected.maps[direction])


def test_second_look_draws_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = look(engine, REQUEST, 0, 0.0, (0.5, 0.5))
    monkeypatch.setattr(engine._loaded.pipe, "predict_velocity", None)  # type: ignore[union-attr]
    assert np.array_equal(
        look(engine, REQUEST, 0, 0.0, (0.5, 0.5)).influence.maps["all"], first.influence.maps["all"]
    )
    last = look(engine, REQUEST, 9, 1.0, (1.0, 1.0))  # of a layer that is not there, the last
    assert (last.layer, last.call, last.influence.point) == (1, 2, (3, 5))
    with pytest.raises(AppError):
        look(engine, dataclasses.replace(REQUEST, seed=6), 0, 0.0, (0.5, 0.5))


def test_large_drawings_keep_one_step_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = dataclasses.replace(REQUEST, seed=77, steps=5)
    kept = look(engine, request, 1, 0.75, (0.2, 0.2))
    engine._recorded.clear()
    monkeypatch.setattr("gspn2_diffusion.webapp.engine._RECORD_BYTES", 0)
    alone = look(engine, request, 1, 0.75, (0.2, 0.2))
    assert not engine._recorded
    assert (alone.call, alone.calls) == (kept.call, kept.calls) == (3, 5)
    assert np.array_equal(alone.influence.maps["all"], kept.influence.maps["all"])


def test_stop_ends_a_look(engine: Engine) -> None:
    stop = threading.Event()
    stop.set()
    request = dataclasses.replace(REQUEST, seed=78, steps=200)
    assert not any(isinstance(e, Looked) for e in engine.look(request, 0, 0.0, (0.5, 0.5), stop))
    assert len(engine.line) == 0


def test_overlay_marks_the_point_and_brightens_what_is_strong() -> None:
    shown = np.zeros((4, 6), np.float32)
    shown[1, 4] = 1.0
    picture = Image.new("RGB", (24, 16), "gray")
    drawn = overlay(picture, shown, (2, 1))
    assert drawn.size == display_size(picture.size) == (624, 416)
    pixels = np.asarray(drawn, dtype=int)
    assert pixels[156, 468].sum() > pixels[30, 30].sum() + 150  # the strong token, and a dark corner
    ring = pixels[260 - 40 : 260 + 40, 156 - 40 : 156 + 40]
    assert (abs(ring - [56, 224, 255]).sum(-1) < 10).any()
