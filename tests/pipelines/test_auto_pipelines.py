"""diffusers' AutoPipelineFor... finds the pipelines, whichever side is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines import auto_pipelines
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline

TASKS = [
    (AutoPipelineForText2Image, GSPN2Pipeline),
    (AutoPipelineForImage2Image, GSPN2Img2ImgPipeline),
    (AutoPipelineForInpainting, GSPN2InpaintPipeline),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto") / "model"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("auto", "expected"), TASKS)
def test_from_pretrained(saved: Path, auto: type, expected: type) -> None:
    pipe = auto.from_pretrained(str(saved))  # type: ignore[attr-defined]
    assert type(pipe) is expected
    assert pipe.config["max_sequence_length"] == 12


@pytest.mark.parametrize(("auto", "expected"), TASKS)
def test_from_pipe_between_all_tasks(auto: type, expected: type) -> None:
    text = build_tiny_pipeline()
    for _, source in TASKS:
        pipe = auto.from_pipe(source.from_pipe(text))  # type: ignore[attr-defined]
        assert type(pipe) is expected
        assert pipe.transformer is text.transformer
        assert pipe.config["max_sequence_length"] == 12


def test_other_pipelines_are_still_found() -> None:
    from diffusers.pipelines.auto_pipeline import _get_model

    assert _get_model("SanaPipeline") == "sana"
    assert _get_model("GSPN2InpaintPipeline") == _get_model(["pipeline", "GSPN2Pipeline"]) == "gspn2"
    assert _get_model("NoSuchPipeline") is None


def test_a_diffusers_without_a_mapping_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    module = ModuleType("auto_pipeline")
    module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING = {}  # type: ignore[attr-defined]
    auto_pipelines.fill_mappings(module)
    assert {"gspn2": GSPN2Pipeline} == module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING  # type: ignore[attr-defined]
    assert len([record for record in caplog.records if record.name == auto_pipelines.logger.name]) == 2


OURS = "import gspn2_diffusion.pipelines"
THEIRS = "from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING as mapping"


@pytest.mark.slow
@pytest.mark.parametrize("lines", [[OURS, THEIRS], [THEIRS, OURS]], ids=["ours-first", "theirs-first"])
def test_in_a_fresh_process(lines: list[str]) -> None:
    program = "\n".join([*lines, "print(mapping['gspn2'].__name__)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "GSPN2InpaintPipeline"


@pytest.mark.slow
def test_the_import_stays_light() -> None:
    program = f"{OURS}; import sys; print(sorted({{'torch', 'diffusers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
