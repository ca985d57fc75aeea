"""``gspn2 batch`` in processes that are killed, interrupted, or share the work."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest
from ports import reserved_port

sys.path.insert(0, str(Path(__file__).parent))
import batch_troubles
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
    assert forked.finish(forked.start(*arguments("whole"))) == 0
    assert len(content(folder / "whole")) == 50
    return folder / "whole"


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


def keys(folder: Path) -> list[str]:
    """Pictures of the lines that are whole; a kill may have torn others."""
    found = []
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line)["key"])
    return found


def same_seeds(folder: Path) -> None:
    folder.mkdir()
    (folder / ".gspn2-batch.json").write_text('{"seed": 77}')


def test_killed_four_times_ends_as_if_never_killed(arguments, folder, whole):
    broken = folder / "broken"
    same_seeds(broken)

    def kill(trouble: str, number: int) -> None:
        assert forked.finish(batch_troubles.start(trouble, number, *arguments("broken"))) == -9
        assert lines(broken) < 50

    kill("kill_in_drawing", 20)  # of 2 to 4 steps a picture
    assert lines(broken) > 0
    kill("kill_in_line", 5)
    assert not (broken / "manifest.jsonl").read_bytes().endswith(b"\n")
    kill("kill_before_line", 7)
    assert len(keys(broken)) < len(content(broken))
    kill("kill_in_file", 6)
    assert len(list(broken.glob(".*.tmp"))) == 1
    assert forked.finish(forked.start(*arguments("broken"))) == 0
    assert content(broken) == content(whole)
    assert list(broken.glob(".*.tmp")) == []
    assert sorted(keys(broken)) == sorted(keys(whole))


def test_interrupt_finishes_what_is_in_hand(arguments, folder):
    out = folder / "out"
    assert forked.finish(batch_troubles.start("interrupt", 3, *arguments("out"))) == 130
    assert 3 <= lines(out) < 50
    assert {record["file"] for record in records(out)} == set(content(out))


def test_two_processes_share_the_list(arguments, folder, whole):
    two = folder / "two"
    same_seeds(two)
    ranks = [forked.start(*arguments("two"), RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2) for rank in range(2)]
    assert [forked.finish(process) for process in ranks] == [0, 0]
    assert content(two) == content(whole)
    assert records(two) == records(whole)  # each picture once


def test_a_process_with_failures_waits_for_the_others(tiny_model, tmp_path):
    """A launcher takes the other processes down as soon as one ends with an exit code."""
    (tmp_path / "prompts.txt").write_text("a --w 16\nb --w 18\n")  # the second is of no size for this model
    more = ("--out", tmp_path / "out", "--model", tiny_model, "--device", "cpu", "--quiet", "--steps", 1)
    batch = ("batch", tmp_path / "prompts.txt", *more)
    with reserved_port() as port:
        launch = {
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        failing = forked.start(*batch, RANK=1, LOCAL_RANK=1, **launch)
        wait_for_line(tmp_path / "out", failing)
        failing.join(0.5)
        assert failing.is_alive()
        other = forked.start(*batch, RANK=0, LOCAL_RANK=0, **launch)
        assert [forked.finish(process) for process in (other, failing)] == [0, 3]
    assert [record["status"] for record in records(tmp_path / "out")] == ["done", "failed"]


def wait_for_line(folder: Path, process) -> None:
    """Until the process has recorded its picture; one that hangs before is noticed in time."""
    deadline = time.monotonic() + 600
    while not lines(folder) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
