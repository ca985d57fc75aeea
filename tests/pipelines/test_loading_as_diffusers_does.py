"""Loading without naming our class, variants, device maps; public module paths; nothing unpickled."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from same_weights import assert_same_weights
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.model_folders import EMBEDDED_MODELS, class_name, embedded_model_folder
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers copies a folder's code into its cache; not into the user's."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        yield folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


def latents_of(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="latent").images


def assert_same_model(found: Any, wanted: Any) -> None:
    assert_same_weights(found, wanted)
    torch.testing.assert_close(latents_of(found), latents_of(wanted), atol=1e-4, rtol=0)


def test_plain_diffusers_loads_the_folder(saved: Path, tmp_path: Path, pipe: GSPN2Pipeline) -> None:
    assert "GSPN2Pipeline" in (saved / "pipeline.py").read_text()
    again = DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True)
    assert type(again) is GSPN2Pipeline
    assert_same_model(again, pipe)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(str(saved))
    again.save_pretrained(tmp_path)
    files = sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert (tmp_path / "model_index.json").read_bytes() == (saved / "model_index.json").read_bytes()


@pytest.mark.parametrize("custom", ["pipeline", "folder"])
def test_custom_pipeline(saved: Path, custom: str) -> None:
    custom = str(saved) if custom == "folder" else custom
    loaded = DiffusionPipeline.from_pretrained(str(saved), custom_pipeline=custom, trust_remote_code=True)
    assert type(loaded) is GSPN2Pipeline


@pytest.mark.parametrize("custom", ["pipeline", "folder"])
def test_custom_pipelines_of_several_kinds_in_one_process(saved: Path, tmp_path: Path, custom: str) -> None:
    """diffusers runs each folder's ``pipeline.py`` in the module of the one before."""
    kinds = (GSPN2Img2ImgPipeline, GSPN2InpaintPipeline, GSPN2Pipeline, GSPN2Img2ImgPipeline)
    for number, kind in enumerate(kinds):
        folder = str(tmp_path / str(number))
        kind.from_pretrained(saved).save_pretrained(folder)
        name = folder if custom == "folder" else custom
        loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=name, trust_remote_code=True)
        assert type(loaded) is kind


def test_custom_pipeline_for_a_folder_without_the_file(saved: Path, tmp_path: Path) -> None:
    """As saved by the version before: the index names the class alone."""
    old = Path(shutil.copytree(saved, tmp_path / "old"))
    (old / "pipeline.py").unlink()
    index = json.loads((old / "model_index.json").read_text())
    (old / "model_index.json").write_text(json.dumps({**index, "_class_name": "GSPN2Pipeline"}))
    loaded = DiffusionPipeline.from_pretrained(str(old), custom_pipeline=str(saved), trust_remote_code=True)
    assert type(loaded) is GSPN2Pipeline
    assert_same_model(GSPN2Pipeline.from_pretrained(old), loaded)


@pytest.mark.parametrize("kind", [GSPN2Img2ImgPipeline, GSPN2InpaintPipeline])
def test_folders_of_the_other_pipelines(saved: Path, tmp_path: Path, kind: Any) -> None:
    kind.from_pretrained(saved).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(str(tmp_path), trust_remote_code=True)) is kind
    assert type(DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True)) is GSPN2Pipeline
    assert type(GSPN2Pipeline.from_pretrained(tmp_path)) is GSPN2Pipeline  # the class that is named wins


@pytest.mark.slow
def test_plain_diffusers_in_a_fresh_process(saved: Path, tmp_path: Path) -> None:
    program = (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(saved)!r}, trust_remote_code=True)\n"
        "print(type(pipe).__name__, len(pipe('a', num_inference_steps=1).images))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "GSPN2Pipeline 1"


def public_paths(folder: Path) -> dict[str, list[str]]:
    index = json.loads((folder / "model_index.json").read_text())
    return {name: value for name, value in index.items() if isinstance(value, list) and name != "_class_name"}


@pytest.mark.parametrize("name", ["saved", *EMBEDDED_MODELS])
def test_module_paths_in_the_index_are_public(saved: Path, name: str) -> None:
    """What stands in folders that are out there must be importable for ever."""
    folder = saved if name == "saved" else embedded_model_folder(name)
    paths = public_paths(folder)
    assert paths["transformer"] == ["gspn2_diffusion.models.transformer_gspn2", "GSPN2Transformer2DModel"]
    assert {library for part, (library, _) in paths.items() if part != "transformer"} == {
        "diffusers",
        "transformers",
    }
    for library, kind in paths.values():
        assert isinstance(getattr(importlib.import_module(library), kind), type)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "GSPN2Pipeline"]
    assert class_name(index) == class_name({"_class_name": "GSPN2Pipeline"}) == "GSPN2Pipeline"
    assert (folder / "pipeline.py").read_text() == (saved / "pipeline.py").read_text()
    package = importlib.import_module("gspn2_diffusion")
    assert package.GSPN2Pipeline is GSPN2Pipeline
    assert package.GSPN2Img2ImgPipeline is GSPN2Img2ImgPipeline
    assert package.GSPN2InpaintPipeline is GSPN2InpaintPipeline


def test_variant_in_shards(pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    pipe.to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    names = [file.name for file in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(names) > 1
    assert all(".fp16" in name for name in names)
    again = GSPN2Pipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    for (name, ours), theirs in zip(
        again.transformer.state_dict().items(), pipe.transformer.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.raises((OSError, ValueError)):
        GSPN2Pipeline.from_pretrained(tmp_path, variant="ema")


def test_low_memory_and_device_map_change_nothing(saved: Path, pipe: GSPN2Pipeline) -> None:
    for options in ({"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}, {"device_map": "cpu"}):
        if "device_map" in options and torch.cuda.is_available():
            continue  # diffusers allows "cpu" only where it is the best device
        assert_same_model(GSPN2Pipeline.from_pretrained(saved, **options), pipe)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", [GSPN2Pipeline, DiffusionPipeline])
def test_pickled_code_never_runs(saved: Path, tmp_path: Path, kind: Any, component: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    trace = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb works
    trace.unlink()
    name = "pytorch_model.bin" if component == "text_encoder" else "diffusion_pytorch_model.bin"
    for file in (folder / component).glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Bomb(trace)}, folder / component / name)
    options = {"trust_remote_code": True} if kind is DiffusionPipeline else {}
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError, RuntimeError)):
        kind.from_pretrained(str(folder), **options)
    assert not trace.exists()


def test_pickled_weights_beside_safetensors_are_ignored(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    trace = tmp_path / "it ran"
    for component in ("transformer", "vae"):
        torch.save({"weight": Bomb(trace)}, folder / component / "diffusion_pytorch_model.bin")
    loaded = GSPN2Pipeline.from_pretrained(folder)
    assert_same_model(loaded, build_tiny_pipeline())
    assert not trace.exists()
