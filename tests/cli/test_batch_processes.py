"""``gspn2 batch`` in processes that are killed, interrupted, or share the work."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import forked

PROMPTS = "".join(f"a {{red|blue}} apple {k} --w {16 + 8 * (k % 2)} --s {2 + k % 3}\n" for k in range(50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batches")
    (path / "prompts.txt").write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def arguments(tiny_model, folder):
    return lambda out: (
        *("batch", folder / "prompts.txt", "--out", folder / out, "--model", tiny_model),
        *("--device", "cpu", "--quiet"),
    )


@pytest.fixture(scope="module")
def whole(arguments, folder) -> Path:
    """What an unbroken run of one process leaves."""
    same_seeds(folder / "whole")
    assert forked.finish(forked.start(*arguments("whole"), **ONE_THREAD)) == 0
    assert len(content(folder / "whole")) == 50
    return folder / "whole"


ONE_THREAD = {"OMP_NUM_THREADS": 1}


def lines(folder: Path) -> int:
    path = folder / "manifest.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def records(folder: Path) -> list[dict]:
    """Every line of a manifest, in the order of the list and without what a clock wrote."""
    found = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    clock = ("seconds", "time")
    return sorted(({k: v for k, v in r.items() if k not in clock} for r in found), key=lambda r: r["index"])


def same_seeds(folder: Path) -> None:
    folder.mkdir()
    (folder / ".gspn2-batch.json").write_text('{"seed": 77}')


def wait_for(folder: Path, count: int, process) -> None:
    deadline = time.monotonic() + 120
    while lines(folder) < count and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_three_times_ends_as_if_never_killed(arguments, folder, whole):
    broken = folder / "broken"
    same_seeds(broken)
    seed = random.randrange(2**32)
    print("random points from seed", seed)
    points = random.Random(seed)
    for kill in range(3):
        process = forked.start(*arguments("broken"), **ONE_THREAD)
        wait_for(broken, lines(broken) + points.randint(1, 9), process)
        time.sleep(points.random() * 0.02)
        assert process.is_alive(), f"finished before kill {kill + 1}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert 3 <= lines(broken) < 50
    assert forked.finish(forked.start(*arguments("broken"), **ONE_THREAD)) == 0
    assert content(broken) == content(whole)
    assert list(broken.glob(".*.tmp")) == []
    readable = []
    for line in (broken / "manifest.jsonl").read_text().splitlines():
        try:
            readable.append(json.loads(line)["key"])
        except ValueError:
            continue  # a line the kill tore
    assert sorted(readable) == sorted(record["key"] for record in records(whole))


def test_interrupt_finishes_what_is_in_hand(arguments, folder):
    out = folder / "out"
    process = forked.start(*arguments("out"), **ONE_THREAD)
    wait_for(out, 3, process)
    os.kill(process.pid, signal.SIGINT)
    assert forked.finish(process) == 130
    assert 3 <= lines(out) < 50
    assert {record["file"] for record in records(out)} == set(content(out))


def test_two_processes_share_the_list(arguments, folder, whole):
    two = folder / "two"
    same_seeds(two)
    ranks = [
        forked.start(*arguments("two"), RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, **ONE_THREAD)
        for rank in range(2)
    ]
    assert [forked.finish(process) for process in ranks] == [0, 0]
    assert content(two) == content(whole)
    assert records(two) == records(whole)  # each picture once


def test_a_process_with_failures_waits_for_the_others(tiny_model, tmp_path):
    """A launcher takes the other processes down as soon as one ends with an exit code."""
    (tmp_path / "prompts.txt").write_text("a --w 16\nb --w 18\n")  # the second is of no size for this model
    more = ("--out", tmp_path / "out", "--model", tiny_model, "--device", "cpu", "--quiet", "--steps", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ONE_THREAD}
    failing = forked.start("batch", tmp_path / "prompts.txt", *more, RANK=1, LOCAL_RANK=1, **launch)
    wait_for(tmp_path / "out", 1, failing)
    failing.join(0.5)
    assert failing.is_alive()
    other = forked.start("batch", tmp_path / "prompts.txt", *more, RANK=0, LOCAL_RANK=0, **launch)
    assert [forked.finish(process) for process in (other, failing)] == [0, 3]
    assert [record["status"] for record in records(tmp_path / "out")] == ["done", "failed"]
