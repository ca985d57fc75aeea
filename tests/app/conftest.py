from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.webapp.limits import Limits

sys.path.insert(0, str(Path(__file__).parent))
LIMITS = Limits(side=128, min_side=16, steps=400, count=3, queue=3)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Any:
    from gspn2_diffusion.webapp.engine import Engine
    from gspn2_diffusion.webapp.shelf import build_shelf

    engine = Engine(build_shelf([str(tiny_model)]), "cpu", "float32", longest_line=3)
    engine.load_in_background()
    assert engine.wait(120)
    return engine


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Any]:
    """The page as it is served, with a tiny model, on a free port of this machine."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "gspn2-diffusion[app]"')
    from gspn2_diffusion.webapp.server import ServerOptions, launch

    page = launch(ServerOptions(models=(str(tiny_model),), device="cpu", limits=LIMITS), block=False)
    assert page.app.engine.wait(120)
    yield page
    page.blocks.close()
    page.app.store.close()
