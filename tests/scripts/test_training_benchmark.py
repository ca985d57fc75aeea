"""The training benchmark, on a CPU with a tiny model: its rows, what follows from them, runs that add up."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training
import training_forks as forks
import training_report


def row(**changes):
    plain = {
        "model": "0.6b",
        "pixels": 2048,
        "tokens": 16384,
        "compiled": False,
        "mixer": "gspn2",
        "processes": 1,
        "fsdp2": False,
        "memory_cap_gib": None,
        "batch_per_gpu": 1,
        "seconds_per_step": 1,
        "pictures_per_second": 3.0,
        "memory_gib": 7.0,
        "data_wait": 0.01,
        "run": "a",
        "commit": "abc",
    }
    return {**plain, **changes}


def test_runs_are_measured_and_add_up(tmp_path):
    out = tmp_path / "result.json"
    common = ["--tiny", "--out", str(out), "--seconds_per_cell", "0.01", "--seconds", "1e9"]
    training.main([*common, "--commit", "abc"])
    first = json.loads(out.read_text())
    assert [(row["pixels"], row["mixer"]) for row in first["rows"]] == [
        (32, "gspn2"),
        (32, "softmax"),
        (64, "gspn2"),
        (64, "softmax"),
    ]
    for found in first["rows"]:
        assert found["steps"] >= 5
        assert 0 <= found["data_wait"] <= 1
        speed = found["batch_per_gpu"] / found["seconds_per_step"]
        assert found["pictures_per_second"] == pytest.approx(speed)
    assert [found["tokens"] for found in first["comparisons"]] == [4, 16]
    training.main([*common, "--commit", "def", "--mixers", "softmax"])
    second = json.loads(out.read_text())
    assert [(row["mixer"], row["commit"]) for row in second["rows"]] == [
        ("gspn2", "abc"),
        ("gspn2", "abc"),
        ("softmax", "def"),
        ("softmax", "def"),
    ]
    assert second["comparisons"] == []  # of two runs
    assert "| tiny | 64 | 16 | eager | softmax |" in training_report.render(second)
    out.write_text(json.dumps(second | {"gpu": "another"}))
    with pytest.raises(SystemExit, match="has gpu 'another'"):
        training.main([*common, "--mixers", "none"])


def test_processes_may_share_a_gpu(tmp_path):
    """FSDP2 in two of them, over gloo: on one GPU, or without any."""
    out = tmp_path / "result.json"
    options = ["--tiny", "--share_gpu", "--mixers", "gspn2", "--seconds_per_cell", "0.01", "--out", str(out)]
    split = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    codes = forks.train_together("../benchmarks/training", options, 2, FSDP_OFFLOAD_PARAMS="false", **split)
    assert codes == [0, 0]
    rows = json.loads(out.read_text())["rows"]
    assert [row["pixels"] for row in rows] == [32, 64]
    assert all(row["fsdp2"] and row["shared_gpu"] and row["processes"] == 2 for row in rows)


def test_acceptance_cells_come_first():
    cells = training.plan(training.parse([]))
    assert len(cells) == 32
    assert {cell.tokens for cell in cells[:8]} == {1024, 16384}
    assert not any(cell.compiled for cell in cells[:16])
    (capped,) = training.plan(training.parse(["--capped"]))
    assert (capped.model, capped.compiled) == ("0.6b", False)


def test_rows_are_judged():
    softmax = row(mixer="softmax", pictures_per_second=2.4)
    two = row(processes=2, pictures_per_second=5.4, run="b")
    too_large = row(memory_cap_gib=9.0, error="out of memory: x", pixels=256)
    split = row(memory_cap_gib=9.0, processes=2, fsdp2=True, pixels=256)
    rows = [row(), softmax, two, too_large, split]
    (compared,) = training_report.comparisons(rows)
    assert (compared["speedup"], compared["wanted"], compared["met"]) == (1.25, 1.5, False)
    (scaled,) = training_report.scaling(rows)
    assert (scaled["speedup"], scaled["met"]) == (pytest.approx(1.8), False)
    (held,) = training_report.capped(rows)
    assert (held["alone"], held["fsdp2"], held["met"]) == ("out of memory: x", "trains", True)
    assert training_report.capped([split]) == []
    result = {"gpu": "G", "torch": "2", "rows": rows}
    shared = result | {"rows": [too_large, {**split, "shared_gpu": True}]}
    assert "trains, 7.0 GiB in each of 2 processes, on one GPU |" in training_report.render(shared)
    elsewhere = [row(commit="one"), row(commit="two", mixer="softmax"), {**too_large, "commit": "three"}]
    made = training_report.render(result | {"rows": elsewhere}).splitlines()[0]
    assert made == "G, torch 2, commit one, two (memory capped: three); batch per GPU."
    text = training_report.render(result)
    assert "| 0.6b | 2048 | 16384 | eager | gspn2 | 1 | 3.0 | 1000.0 | 7.0 GiB | 1.0% | 1.25x |" in text
    assert "| 9 GiB | out of memory | trains, 7.0 GiB on 2 GPUs |" in text
    assert training_report.summary(rows)["data_wait_met"]
