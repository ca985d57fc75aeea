from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plain_environment
import pytest
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.cli import run

plain_environment.clean()


@dataclass(frozen=True)
class Result:
    """What one command line left behind."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return self.err.splitlines()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def gspn2(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``gspn2 ...`` in this process: as the program does, but torch is imported only once."""
    monkeypatch.delenv("GSPN2_DEBUG", raising=False)

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call
