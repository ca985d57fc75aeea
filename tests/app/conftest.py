from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_environment
import pytest
from tiny_models import build_tiny_pipeline, save_with_few_steps

from gspn2_diffusion.webapp.limits import Limits

sys.path.insert(0, str(Path(__file__).parent))
plain_environment.clean()
# So many steps end on no machine before a test has looked at them, and stopped them.
LIMITS = Limits(side=128, min_side=16, steps=100_000, count=3, queue=3)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tiny_model: Path) -> Path:
    """Another model to choose: other weights of the denoiser, more layers, and an adapter for three steps."""
    return save_with_few_steps(tiny_model.parent / "other", num_layers=3)


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with the LoRA ``ink``; None without peft."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import LoraConfig

    pipe = build_tiny_pipeline()
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_proxy"], init_lora_weights=False)
    )
    folder = tmp_path_factory.mktemp("loras")
    pipe.save_lora_weights(folder, weight_name="ink.safetensors")
    return folder


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[Any]:
    from gspn2_diffusion.webapp.engine import Engine
    from gspn2_diffusion.webapp.shelf import build_shelf

    engine = Engine(build_shelf([str(tiny_model)]), "cpu", "float32", longest_line=3)
    engine.load_in_background()
    assert engine.wait(600)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def server(tiny_model: Path, other_model: Path, lora_folder: Path | None) -> Iterator[Any]:
    """The page as it is served, with tiny models, on a free port of this machine."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "gspn2-diffusion[app]"')
    from gspn2_diffusion.webapp.server import ServerOptions, launch

    models = (str(tiny_model), str(other_model))
    page = launch(ServerOptions(models, lora_folder, device="cpu", limits=LIMITS), block=False)
    assert page.app.engine.wait(600)
    yield page
    page.blocks.close()
    page.app.close()
