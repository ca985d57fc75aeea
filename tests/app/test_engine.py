"""The engine with a tiny model: same picture as the command line's, stop, the line, failures."""

from __future__ import annotations

import dataclasses
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gspn2_diffusion.cli import run
from gspn2_diffusion.cli.console import CliError
from gspn2_diffusion.png_metadata import read_settings
from gspn2_diffusion.webapp.engine import Engine, Event, Finished, Progress, Waiting, _collect
from gspn2_diffusion.webapp.errors import AppError
from gspn2_diffusion.webapp.limits import DrawRequest
from gspn2_diffusion.webapp.samplers import SCHEDULERS
from gspn2_diffusion.webapp.shelf import build_shelf

HANGS = 600  # seconds after which something will never happen, however busy the machine
REQUEST = DrawRequest("a red apple", "blue", 32, 16, 3, 2.0, "euler", 5, 1)


def request(**changes: Any) -> DrawRequest:
    return dataclasses.replace(REQUEST, **changes)


def draw(engine: Engine, wish: DrawRequest) -> list[Any]:
    return list(engine.draw(wish, threading.Event()))


def test_same_picture_as_the_command_line(engine: Engine, tiny_model: Path, tmp_path: Path) -> None:
    finished = [event for event in draw(engine, request(count=2)) if isinstance(event, Finished)]
    path = tmp_path / "cli.png"
    options = ["--negative=blue", "--width=32", "--height=16", "--steps=3", "--guidance=2", "--seed=6", "-q"]
    assert (
        run(["generate", "a red apple", "-o", str(path), "-m", str(tiny_model), "--device=cpu", *options])
        == 0
    )
    assert np.array_equal(np.asarray(finished[1].picture), np.asarray(Image.open(path)))
    assert finished[1].settings == read_settings(path)
    assert not np.array_equal(np.asarray(finished[0].picture), np.asarray(finished[1].picture))


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_schedulers_report_progress_to_the_end(engine: Engine, name: str) -> None:
    events = draw(engine, request(scheduler=name, steps=4))
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert finished.picture.size == (32, 16)
    last = [event for event in events if isinstance(event, Progress)][-1]
    assert last.done == last.total >= 4
    again = draw(engine, request(scheduler=name, steps=4))[-1]
    assert np.array_equal(np.asarray(again.picture), np.asarray(finished.picture))


def test_of_reports_that_pile_up_the_last_before_a_picture_is_kept() -> None:
    """However late the reader comes: what it is told about a picture ends with that picture's last step."""
    picture = Image.new("RGB", (8, 8))
    waiting: queue.Queue[Event | None] = queue.Queue()
    for number in range(2):
        for done in (1, 2, 3):
            waiting.put(Progress(number, 2, done, 3, 0.0, None))
        waiting.put(Finished(number, 2, picture, None))  # type: ignore[arg-type]
    waiting.put(None)
    seen = [(type(event), event.number, getattr(event, "done", None)) for event in _collect(waiting)]
    assert seen == [(Progress, 0, 3), (Finished, 0, None), (Progress, 1, 3), (Finished, 1, None)]


def test_stop_ends_everything_that_was_asked_for(engine: Engine) -> None:
    stop, many = threading.Event(), 100_000  # steps of a tiny model may outrun this thread, but not so many
    events = []
    for event in engine.draw(request(steps=many, count=3), stop):
        events.append(event)
        if isinstance(event, Progress):
            stop.set()
    assert not any(isinstance(event, Finished) for event in events)
    assert events[-1].done < many
    assert len(engine.line) == 0
    assert isinstance(draw(engine, request())[-1], Finished)  # and the next one is served


def test_stop_in_the_middle_of_a_step_that_takes_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, calls, stop = engine._loaded.pipe, 0, threading.Event()  # type: ignore[union-attr]
    predict = pipe.predict_velocity

    def slow(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            stop.set()  # comes while the second step runs
        return predict(*args)

    monkeypatch.setattr(pipe, "predict_velocity", slow)
    events = list(engine.draw(request(steps=50), stop))
    assert calls == 2
    assert not any(isinstance(event, Finished) for event in events)


def test_closing_the_iterator_frees_the_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, calls, second, closing = engine._loaded.pipe, 0, threading.Event(), threading.Event()  # type: ignore[union-attr]
    predict = pipe.predict_velocity

    def held(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            second.set()
            closing.wait(HANGS)
        return predict(*args)

    monkeypatch.setattr(pipe, "predict_velocity", held)
    stop = threading.Event()
    events = engine.draw(request(steps=50), stop)
    next(events)
    assert second.wait(HANGS)
    threading.Thread(target=lambda: (stop.wait(HANGS), closing.set())).start()
    events.close()  # sets the stop signal, which lets the second step go on
    assert calls == 2
    assert len(engine.line) == 0


def test_others_wait_in_line_and_can_give_up(engine: Engine) -> None:
    first = engine.draw(request(steps=400), threading.Event())
    while not isinstance(next(first), Progress):
        pass
    stop = threading.Event()
    second = engine.draw(request(), stop)
    assert next(second) == Waiting(loading=False, before=1)
    third = engine.draw(request(), threading.Event())
    assert next(third) == Waiting(loading=False, before=2)
    with pytest.raises(AppError, match="3 requests are waiting"):
        next(engine.draw(request(), threading.Event()))
    stop.set()
    assert list(second) == []
    first.close()
    assert isinstance(list(third)[-1], Finished)


def test_failures_are_sentences(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/secret/path broke")

    monkeypatch.setattr(engine._loaded.pipe, "predict_velocity", broken)  # type: ignore[union-attr]
    with pytest.raises(AppError, match="Drawing failed") as failure:
        draw(engine, request())
    assert "/secret" not in str(failure.value)
    assert "/secret/path broke" in caplog.text
    assert len(engine.line) == 0


def test_out_of_memory_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine._loaded.pipe, "predict_velocity", full)  # type: ignore[union-attr]
    with pytest.raises(AppError, match="not enough memory"):
        draw(engine, request())


def test_enlarges_what_it_drew_twice(engine: Engine) -> None:
    first = draw(engine, request(steps=4))[-1]
    wish = request(steps=10, width=64, height=32, picture=first.picture, strength=0.5, enlarge=True)
    events = draw(engine, wish)
    assert isinstance(events[-1], Finished)
    assert events[-1].picture.size == (64, 32)
    assert events[-1].settings.source["task"] == "enlarge"
    steps = [(event.done, event.total) for event in events if isinstance(event, Progress)]
    assert steps[-1] == (5, 5)  # half of the schedule
    stop = threading.Event()
    stop.set()
    assert list(engine.draw(wish, stop)) == []


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="no such folder"):
        build_shelf([str(tmp_path / "nothing")])


def test_info_reveals_no_path(engine: Engine, tiny_model: Path) -> None:
    info = engine.info()
    assert info["state"] == "ready"
    assert (info["model"], info["device"], info["backend"]) == ("tiny", "cpu", "plain torch")
    assert str(tiny_model.parent) not in str(info)
