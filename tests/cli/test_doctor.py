from __future__ import annotations

import contextlib
import json

import pytest
import torch

from gspn2_diffusion.cli import checks
from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.pipelines import model_folders

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def embedded(monkeypatch, tiny_model):
    """The tiny model in the place of the embedded one."""
    monkeypatch.setattr(model_folders, "embedded_model_folder", lambda name: tiny_model)


def rows(result) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(result.out)["checks"]}


@without_gpu
@pytest.mark.parametrize("variable", ["", "FORCE_COLOR"])
def test_a_machine_without_a_gpu_is_fine(gspn2, embedded, monkeypatch, variable):
    if variable:  # colours in a pipe, but neither a bar nor a terminal's width
        monkeypatch.setenv(variable, "1")
        monkeypatch.setenv("COLUMNS", "20")
    result = gspn2("doctor")
    assert (result.code, result.err) == (0, "")
    for name in ("python", "torch", "diffusers", "transformers", "accelerate", "CuPy", "backend", "model"):
        assert name in result.out


@without_gpu
def test_json(gspn2, embedded, tiny_model):
    result = gspn2("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["ok"] is True
    found = rows(result)
    assert found["torch"]["value"] in (torch.__version__, torch.__version__.split("+")[0])  # from PyPI
    assert found["backend"]["value"] == "reference"
    assert "no CUDA device" in found["backend"]["detail"]
    assert found["imports"]["value"] == "GSPN2Pipeline"
    assert {row["status"] for row in found.values()} <= {"ok", "note"}


@without_gpu
def test_prewarm_needs_a_gpu(gspn2):
    result = gspn2("doctor", "--prewarm")
    assert (result.code, len(result.error_lines)) == (1, 1)
    assert "--prewarm" in result.err


def test_missing_and_damaged_model(gspn2, monkeypatch, tmp_path):
    monkeypatch.setattr(model_folders, "embedded_model_folder", lambda name: tmp_path / "model")
    for _ in range(2):
        result = gspn2("doctor", "--json")
        assert (result.code, len(result.error_lines)) == (1, 1)
        assert json.loads(result.out)["ok"] is False
        assert (
            rows(result)[next(name for name in rows(result) if name.startswith("model"))]["status"]
            == "broken"
        )
        (tmp_path / "model").mkdir(exist_ok=True)  # now there, but empty


def test_missing_and_old_packages(monkeypatch):
    real = checks.installed
    monkeypatch.setattr(
        checks, "installed", lambda name: {"torch": "1.0", "rich": None}.get(name, real(name))
    )
    found = {row.name: row for row in checks.check_packages()}
    assert found["rich"].status == "broken"
    assert found["diffusers"].status == "ok"
    if checks._required_ranges():  # only known where the package is installed
        assert (found["torch"].status, found["torch"].value) == ("broken", "1.0")


def test_gpu_without_kernels_is_broken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(cupy_backend, "availability", lambda: (False, "CuPy is missing"))
    found = list(checks.check_backend())
    assert [(row.status, row.value, row.detail) for row in found] == [
        ("broken", "reference", "CuPy is missing")
    ] * 2
    assert list(checks.check_kernels()) == list(checks.check_scan()) == []


def test_a_check_that_raises_is_a_broken_row():
    def check():
        yield checks.Check("first", "ok", "1")
        raise RuntimeError("out of\norder")

    first, second = checks.guarded("second", check)
    assert first.status == "ok"
    assert (second.name, second.status, second.detail) == ("second", "broken", "RuntimeError: out of order")


def test_scan_errors_measure(monkeypatch):
    errors = checks.scan_errors("cpu", backend="reference")
    assert set(errors) == {"y", "dx", "dweight", "dlam", "du"}
    assert all(0 < error < 1e-5 for error in errors.values())
    right = checks.scan_errors
    for wrong in (0.01, float("nan")):
        monkeypatch.setattr(checks, "usable_gpus", lambda: [0])
        monkeypatch.setattr(checks, "scan_errors", lambda device, w=wrong: {**errors, "dlam": w})
        assert [row.status for row in checks.check_scan()] == ["broken"]
    monkeypatch.setattr(checks, "scan_errors", lambda device: right("cpu", "reference"))
    assert [row.status for row in checks.check_scan()] == ["ok"]


@pytest.mark.gpu
def test_on_a_gpu(gspn2, embedded):
    result = gspn2("doctor", "--json")
    assert result.code == 0, result.out
    found = rows(result)
    assert found["backend 0"]["value"] == "cupy"
    assert found["kernels 0"]["value"] == f"{len(cupy_backend.variants())} compiled"
    assert found["scan 0"]["value"] == "right"
    assert gspn2("doctor", "--prewarm").code == 0
