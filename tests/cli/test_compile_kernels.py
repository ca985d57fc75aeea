from __future__ import annotations

import pytest
from script_modules import load_script

from gspn2_diffusion.ops import cupy_backend

pytest.importorskip("cupy_backends.cuda.libs.nvrtc")


@pytest.fixture
def script(monkeypatch):
    module = load_script("scripts/compile_kernels.py", known=True)
    every = cupy_backend.variants()
    monkeypatch.setattr(cupy_backend, "variants", lambda *_: every[:1])
    return module


def test_compiles_without_a_gpu(script, capsys):
    assert script.main(["--arch", "sm_75", "--arch", "sm_120"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-5] for line in lines[:-1]] == ["sm_75", "sm_120"]
    assert all(float(line.split()[-2]) > 1 for line in lines[:-1])
    assert lines[-1].startswith("2 of 2 compiled for 2 architectures")


def test_a_kernel_that_does_not_compile(script, capsys, monkeypatch):
    monkeypatch.setattr(cupy_backend, "kernel_source", lambda *_: "__global__ void broken( {")
    assert script.main(["--arch", "sm_90"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "0 of 1 compiled" in captured.out
    assert "line 1" in captured.err or "(1)" in captured.err


def test_unknown_architecture(script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--arch", "ninety"])
    assert "'ninety'" in capsys.readouterr().err
    assert script.main(["--arch", "sm_11"]) == 1  # well formed, but no compiler knows it
