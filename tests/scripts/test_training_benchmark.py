"""The training benchmark, on a CPU with a tiny model."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_cells_are_measured_and_written(benchmark, tmp_path):
    out = tmp_path / "result.json"
    benchmark.main(["--tiny", "--out", str(out), "--seconds_per_cell", "0.01", "--commit", "abc"])
    result = json.loads(out.read_text())
    assert result["commit"] == "abc"
    assert {(row["pixels"], row["mixer"]) for row in result["cells"]} == {
        (32, "gspn2"),
        (32, "softmax"),
        (64, "gspn2"),
        (64, "softmax"),
    }
    for row in result["cells"]:
        assert row["steps"] >= 5
        assert 0 <= row["data_wait"] <= 1
        assert row["pictures_per_second"] == pytest.approx(row["batch_per_gpu"] / row["seconds_per_step"])
    assert [row["tokens"] for row in result["comparisons"]] == [4, 16]


def test_acceptance_cells_come_first_and_are_judged(benchmark):
    cells = benchmark.plan(benchmark.parse([]))
    assert len(cells) == 32
    assert {cell.tokens for cell in cells[:8]} == {1024, 16384}
    assert not any(cell.compiled for cell in cells[:16])
    rows = [
        {
            "model": "0.6b",
            "pixels": 2048,
            "tokens": 16384,
            "compiled": False,
            "mixer": mixer,
            "seconds_per_step": 1,
            "pictures_per_second": speed,
        }
        for mixer, speed in (("gspn2", 3.0), ("softmax", 2.4))
    ]
    assert benchmark.compare(rows) == [
        {"model": "0.6b", "tokens": 16384, "compiled": False, "speedup": 1.25, "wanted": 1.5, "met": False}
    ]
