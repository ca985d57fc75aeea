"""Saving and loading: round trips, the embedded model's name, damaged folders, no pickle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from same_weights import assert_same_weights
from tiny_models import MAX_TOKENS, build_tiny_pipeline

import gspn2_diffusion.checkpoints
from gspn2_diffusion.pipelines.model_folders import embedded_model_folder
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, for tests that damage it."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def latents_of(pipe: GSPN2Pipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", num_inference_steps=2, generator=generator, output_type="latent").images


def assert_same_model(found: GSPN2Pipeline, wanted: GSPN2Pipeline) -> None:
    assert_same_weights(found, wanted)
    torch.testing.assert_close(latents_of(found), latents_of(wanted), atol=1e-4, rtol=0)


def test_round_trip(pipe: GSPN2Pipeline, saved: Path) -> None:
    again = GSPN2Pipeline.from_pretrained(saved)
    assert_same_model(again, pipe)
    assert again.config["max_sequence_length"] == MAX_TOKENS
    assert again.tokenizer("a red rocket").input_ids == pipe.tokenizer("a red rocket").input_ids
    assert not list(saved.rglob("*.bin"))


def test_index_names_the_public_module_of_the_transformer(saved: Path) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "GSPN2Pipeline"]
    assert index["transformer"] == ["gspn2_diffusion.models.transformer_gspn2", "GSPN2Transformer2DModel"]
    assert index["text_encoder"] == ["transformers", "BertModel"]


def test_round_trip_in_shards(pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    for component in ("transformer", "vae"):
        assert len(list((tmp_path / component).glob("*-of-*.safetensors"))) > 1
        assert (tmp_path / component / f"{WEIGHTS}.index.json").is_file()
    assert_same_model(GSPN2Pipeline.from_pretrained(str(tmp_path)), pipe)


def test_saving_again_leaves_no_local_path_behind(saved: Path, tmp_path: Path) -> None:
    pipe = GSPN2Pipeline.from_pretrained(saved)
    assert pipe.transformer.config["_name_or_path"] == str(saved / "transformer")
    pipe.save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(saved) for path in saved.rglob("*.json"))
    assert files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.json")
    )
    for file in files:
        assert str(saved.parent) not in (tmp_path / "again" / file).read_text(), file
    assert_same_model(GSPN2Pipeline.from_pretrained(tmp_path / "again"), pipe)


def test_dtype_and_replaced_components(saved: Path) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    pipe = GSPN2Pipeline.from_pretrained(saved, dtype=torch.bfloat16, scheduler=scheduler)
    assert {model.dtype for model in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert pipe.scheduler is scheduler
    assert latents_of(pipe).dtype == torch.float32


def test_bfloat16_folder_keeps_its_dtype_on_disk(pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    expected = latents_of(pipe.to(dtype=torch.bfloat16))
    pipe.save_pretrained(tmp_path)
    again = GSPN2Pipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(again, pipe)
    assert {part.dtype for part in (again.transformer, again.vae, again.text_encoder)} == {torch.bfloat16}
    # As near as bfloat16 is to itself on another path of rounding: a unit in the last place, 1 / 128.
    assert (latents_of(again) - expected).norm() < 0.03 * expected.norm()


def test_text_encoder_may_be_left_out(saved: Path) -> None:
    full = GSPN2Pipeline.from_pretrained(saved)
    embeds, mask, negative, negative_mask, *_ = full.encode_prompt("a red apple")
    pipe = GSPN2Pipeline.from_pretrained(saved, tokenizer=None, text_encoder=None)
    pictures = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    torch.testing.assert_close(pictures.images, latents_of(full), atol=1e-4, rtol=0)


def test_embedded_name_leads_into_the_package(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(next(iter(gspn2_diffusion.checkpoints.__path__)))
    assert embedded_model_folder("gspn2-emoji") == package / "gspn2-emoji"
    (tmp_path / "package").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(gspn2_diffusion.checkpoints, "__path__", [str(tmp_path / "package")])
    with pytest.raises(FileNotFoundError, match=r"package/gspn2-emoji is missing"):
        GSPN2Pipeline.from_pretrained("gspn2-emoji")
    shutil.copytree(saved, tmp_path / "package" / "gspn2-emoji")
    pipe = GSPN2Pipeline.from_pretrained("gspn2-emoji")
    assert pipe.config["_name_or_path"] == str(tmp_path / "package" / "gspn2-emoji")


def test_a_local_folder_of_the_embedded_name_wins(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "gspn2-emoji")
    monkeypatch.chdir(tmp_path)
    assert GSPN2Pipeline.from_pretrained("gspn2-emoji").config["_name_or_path"] == "gspn2-emoji"


@pytest.mark.parametrize("name", ["./nowhere", "a/b/nowhere", "/nowhere", Path("nowhere"), "nowhere/"])
def test_missing_folder(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder; looked for .*nowhere.*model_index\.json"):
        GSPN2Pipeline.from_pretrained(name)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing"])
def test_unknown_name_goes_to_diffusers_and_the_error_says_what_was_tried(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"'{name}' is neither a local folder") as caught:
        GSPN2Pipeline.from_pretrained(name, local_files_only=True, cache_dir=tmp_path)
    assert caught.value.__cause__ is not None


def test_wrong_type_of_name() -> None:
    with pytest.raises(
        TypeError, match="`pretrained_model_name_or_path` must be a string or a path, got int"
    ):
        GSPN2Pipeline.from_pretrained(3)


def test_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a pipeline folder: model_index\.json is missing"):
        GSPN2Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"text"'])
def test_damaged_index(copy: Path, text: str) -> None:
    (copy / "model_index.json").write_text(text)
    with pytest.raises(OSError, match=r"is damaged: .*model_index\.json"):
        GSPN2Pipeline.from_pretrained(copy)


def test_missing_component(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    with pytest.raises(FileNotFoundError, match=r"the component 'vae', but the sub-folder .*vae is missing"):
        GSPN2Pipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "file", [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"]
)
def test_weights_cut_short(copy: Path, file: str) -> None:
    os.truncate(copy / file, (copy / file).stat().st_size // 2)
    with pytest.raises(OSError, match=rf"{file} is damaged or cut short"):
        GSPN2Pipeline.from_pretrained(copy)


def test_pickled_weights_are_never_read(copy: Path, pipe: GSPN2Pipeline) -> None:
    (copy / "transformer" / WEIGHTS).unlink()
    torch.save(pipe.transformer.state_dict(), copy / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        GSPN2Pipeline.from_pretrained(copy)
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        GSPN2Pipeline.from_pretrained(copy, use_safetensors=False)


@pytest.mark.slow
def test_a_fresh_process_loads_the_folder_without_cupy(saved: Path) -> None:
    """With the public name alone: diffusers finds a custom class only if its module was imported before."""
    program = (
        "import sys; from gspn2_diffusion import GSPN2Pipeline\n"
        f"pipe = GSPN2Pipeline.from_pretrained({str(saved)!r})\n"
        "pipe('a', num_inference_steps=1)\n"
        "print(sorted({'cupy', 'scipy', 'matplotlib', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
