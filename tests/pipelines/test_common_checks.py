"""What diffusers' PipelineTesterMixin checks, on all three pipelines."""

from __future__ import annotations

import ast
import inspect
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from same_weights import assert_same_weights
from three_pipelines import CASES, IMAGE, Case
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline

TEXT = {"prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds"}
TEXT |= {"negative_prompt_embeds", "attention_kwargs"}
ALWAYS_OPTIONAL = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type"}
ALWAYS_OPTIONAL |= {"return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_call_has_the_common_arguments_and_all_are_optional(case: Case) -> None:
    parameters = inspect.signature(case.kind.__call__).parameters
    assert set(parameters) >= TEXT | ALWAYS_OPTIONAL | set(case.inputs)
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    assert required == {"self"}


def test_save_and_load(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also with ``safe_serialization=False``, as diffusers' suite saves: safetensors all the same."""
    pipe = case.build()
    with caplog.at_level(logging.WARNING, logger="gspn2_diffusion"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert "weights are never pickled" in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    again = case.kind.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_same_weights(again, pipe)
    torch.testing.assert_close(case.run(again), case.run(pipe), atol=1e-5, rtol=0)


def test_components_are_what_was_passed(case: Case) -> None:
    components = build_tiny_pipeline().components
    pipe = case.kind(**components)
    assert pipe.components == components
    assert set(components) == {"tokenizer", "text_encoder", "vae", "transformer", "scheduler"}


def test_pictures_have_their_shape_and_batches_their_number(case: Case) -> None:
    pipe = case.build()
    assert case.run(pipe).shape == (1, 3, 16, 16)
    assert case.run(pipe, prompt=[100 * "very long "]).shape == (1, 3, 16, 16)
    for count, images in ((1, 2), (2, 1), (2, 2)):
        drawn = case.run(pipe, count, num_images_per_prompt=images, num_inference_steps=1)
        assert drawn.shape == (count * images, 3, 16, 16)


def test_each_picture_of_a_batch_equals_it_alone(case: Case) -> None:
    pipe = case.build()
    torch.testing.assert_close(case.run(pipe, 3)[:1], case.run(pipe), atol=1e-4, rtol=0)


def test_tuple_and_output_are_equal(case: Case) -> None:
    pipe = case.build()
    output, (images,) = pipe(**case.arguments()), pipe(**case.arguments(), return_dict=False)
    assert torch.equal(output.images, images)
    assert torch.equal(output[0], images)


def test_guidance_on_and_off(case: Case) -> None:
    pipe = case.build()
    plain, guided = case.run(pipe, guidance_scale=1.0), case.run(pipe, guidance_scale=7.5)
    assert plain.shape == guided.shape
    assert (plain - guided).abs().max() > 0.001


def test_output_types_are_the_same_picture(case: Case) -> None:
    pipe = case.build()
    tensor, array = case.run(pipe), case.run(pipe, output_type="np")
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array, atol=1e-6)
    picture = np.asarray(case.run(pipe, output_type="pil")[0])
    assert np.abs(picture - (array[0] * 255).round()).max() < 2


@pytest.mark.parametrize("name", ["image", "inpaint"])
def test_input_types_are_the_same_picture(name: str) -> None:
    case = CASES[name]
    pipe = case.build()
    array = IMAGE.permute(0, 2, 3, 1).numpy()
    expected = case.run(pipe)
    torch.testing.assert_close(case.run(pipe, image=array), expected, atol=1e-5, rtol=0)
    picture = PIL.Image.fromarray((array[0] * 255).round().astype(np.uint8))
    torch.testing.assert_close(case.run(pipe, image=picture), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(case.run(pipe, 2, image=[IMAGE, IMAGE])[:1], expected, atol=1e-4, rtol=0)


def test_dtype_reaches_every_component(case: Case, tmp_path: Path) -> None:
    pipe = case.build()
    models = ("transformer", "vae", "text_encoder")
    assert {getattr(pipe, name).dtype for name in models} == {torch.float32}
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype=torch.float16)
    assert {getattr(pipe, name).dtype for name in models} == {torch.float16}
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    loaded = case.kind.from_pretrained(tmp_path, dtype=dtypes)
    assert {name: getattr(loaded, name).dtype for name in models} == {
        "transformer": torch.bfloat16,
        "vae": torch.float16,
        "text_encoder": torch.float16,
    }


def test_callbacks_get_what_they_may_have(case: Case) -> None:
    pipe = case.build()
    seen: list[set[str]] = []

    def change(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(set(tensors))
        if step == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    for names in (["latents"], pipe._callback_tensor_inputs):
        seen.clear()
        options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        assert case.run(pipe, output_type="latent", **options).abs().sum() == 0
        assert seen == [set(names)] * pipe.num_timesteps


def test_callbacks_may_raise_the_guidance(case: Case) -> None:
    pipe = case.build()

    def more(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._guidance_scale += 1.0
        return tensors

    case.run(pipe, guidance_scale=2.0, callback_on_step_end=more)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_variants_are_files_of_their_own(case: Case, tmp_path: Path) -> None:
    pipe = case.build()
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="You are trying to load the model files of the `variant=fp16`"):
        case.kind.from_pretrained(tmp_path / "plain", variant="fp16")
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    for name in ("transformer", "vae", "text_encoder"):
        files = [path.name for path in (tmp_path / "half" / name).glob("*.safetensors")]
        assert len(files) == 1
        assert files[0].endswith(".fp16.safetensors")
    again = case.kind.from_pretrained(tmp_path / "half", variant="fp16")
    for name in ("transformer", "vae", "text_encoder"):
        theirs = getattr(again, name).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(pipe, name).state_dict().items())


def test_prompts_can_be_encoded_apart(case: Case) -> None:
    """A pipeline of only the text encoder encodes, one without it draws the same from that."""
    full = case.build()
    components = dict(full.components)
    nothing = dict.fromkeys(components)
    text = {name: components[name] for name in ("tokenizer", "text_encoder")}
    encoded = case.kind(**{**nothing, **text}).encode_prompt("a red apple", negative_prompt="blue")
    names = ReturnNameVisitor()  # how diffusers' suite finds out what came
    names.visit(ast.parse(textwrap.dedent(inspect.getsource(case.kind.encode_prompt))))
    assert len(names.return_names) == len(encoded) == 6
    embeds = dict(zip(names.return_names, encoded, strict=True))
    assert set(embeds) <= set(inspect.signature(case.kind.__call__).parameters)
    without = case.kind(**{**components, "tokenizer": None, "text_encoder": None})
    without.set_progress_bar_config(disable=True)
    drawn = case.run(without, prompt=None, negative_prompt=None, **embeds)
    expected = case.run(full, prompt="a red apple", negative_prompt="blue")
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)


def test_from_pipe_shares_and_leaves_the_other_alone(case: Case) -> None:
    source = build_tiny_pipeline()
    source.set_progress_bar_config(disable=True)
    before = CASES["text"].run(source)
    pipe = case.kind.from_pipe(source)
    pipe.set_progress_bar_config(disable=True)
    assert all(pipe.components[name] is part for name, part in source.components.items())
    direct = case.kind(**source.components)
    direct.set_progress_bar_config(disable=True)
    assert torch.equal(case.run(pipe), case.run(direct))
    assert torch.equal(CASES["text"].run(source), before)
    back = GSPN2Pipeline.from_pipe(pipe)
    public = {name: value for name, value in source.config.items() if not name.startswith("_")}
    assert {name: value for name, value in back.config.items() if not name.startswith("_")} == public


def test_what_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the upload itself; the folder must not carry this machine's paths."""
    from diffusers.pipelines import pipeline_utils
    from diffusers.utils import hub_utils
    from huggingface_hub import ModelCard

    uploads: list[dict[str, Any]] = []

    def upload(**arguments: Any) -> str:
        folder = Path(arguments["folder_path"])
        files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        texts = {name: path.read_text() for name, path in files.items() if path.suffix == ".json"}
        uploads.append({**arguments, "files": set(files), "texts": texts})
        return "done"

    class Repository:
        repo_id = "somebody/tiny"

    for module in (pipeline_utils, hub_utils):
        monkeypatch.setattr(module, "create_repo", lambda *_, **__: Repository)
        monkeypatch.setattr(module, "load_or_create_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    monkeypatch.setattr(hub_utils, "upload_folder", upload)
    build_tiny_pipeline().save_pretrained(tmp_path / "local")
    pipe = GSPN2Img2ImgPipeline.from_pretrained(tmp_path / "local")
    pipe.push_to_hub("somebody/tiny", private=True, commit_message="mine", variant="fp16")
    pipe.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="somebody/tiny")
    pipe.transformer.push_to_hub("somebody/tiny")
    assert [upload["repo_id"] for upload in uploads] == ["somebody/tiny"] * 3
    assert uploads[0]["commit_message"] == "mine"
    assert "transformer/diffusion_pytorch_model.fp16.safetensors" in uploads[0]["files"]
    for upload_ in uploads[:2]:
        assert {"model_index.json", "pipeline.py", "README.md"} <= upload_["files"]
        assert not [name for name, text in upload_["texts"].items() if str(tmp_path) in text]
        index = json.loads(upload_["texts"]["model_index.json"])
        assert index["_class_name"] == ["pipeline", "GSPN2Img2ImgPipeline"]
    assert "diffusion_pytorch_model.safetensors" in uploads[2]["files"]
