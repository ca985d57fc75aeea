"""LoRA on the command line: by name, per prompt, recorded, and exactly the pipeline's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.batch.prompts import Entry, PromptError, parse_lora, parse_prompts, take_lora_tags
from gspn2_diffusion.files import file_hash
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.png_metadata import MetadataError, read_parameters, read_settings

pytest.importorskip("peft", reason="needs peft: pip install 'peft>=0.17'")
STANDARD_NAME = "pytorch_lora_weights.safetensors"
COMMON = ("--steps", 2, "--device", "cpu", "--seed", 5)


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    """``ink.safetensors`` and the folder ``clay``, both trained-looking; ``wrong`` is for another model."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("ink", "clay", "wrong")):
        pipe = build_tiny_pipeline(**({"attention_head_dim": 4} if name == "wrong" else {}))
        pipe.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_proxy"], init_lora_weights=False)
        )
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in pipe.transformer.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        pipe.save_lora_weights(folder / name)
    (folder / "ink" / STANDARD_NAME).rename(folder / "ink.safetensors")
    (folder / "wrong" / STANDARD_NAME).rename(folder / "wrong.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not JSON at all")
    return folder


@pytest.fixture
def draw(gspn2, tiny_model, tmp_path):
    def call(name: str, *more: object) -> Path:
        path = tmp_path / f"{name}.png"
        result = gspn2("generate", "a red apple", "-o", path, "--model", tiny_model, *COMMON, *more)
        assert result.code == 0, result.err
        return path

    return call


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_generate_draws_what_the_pipeline_draws(draw, tiny_model, loras):
    path = draw("ours", "--lora", "ink:0.5", "--lora", loras / "clay", "--lora-dir", loras)
    # Loaded as well: weights at other places of the memory may give sums another order.
    pipe = GSPN2Pipeline.from_pretrained(str(tiny_model))
    for name, folder, file in (
        ("ink", loras, "ink.safetensors"),
        ("clay", loras / "clay", STANDARD_NAME),
    ):
        pipe.load_lora_weights(folder, weight_name=file, adapter_name=name)
    pipe.set_adapters(["ink", "clay"], [0.5, 1.0])
    generator = torch.Generator().manual_seed(5)
    (image,) = pipe("a red apple", num_inference_steps=2, generator=generator).images
    assert np.array_equal(pixels(path), np.asarray(image))
    settings = read_settings(path)
    assert [(used["name"], used["weight"]) for used in settings.loras] == [("ink", 0.5), ("clay", 1.0)]
    assert settings.loras[0]["sha256"] == file_hash(loras / "ink.safetensors")
    assert read_parameters(path)["Lora weights"] == "ink: 0.5, clay: 1"
    assert str(loras) not in settings.to_json()


def test_each_prompt_its_own_and_the_same_as_alone(gspn2, draw, tiny_model, loras, tmp_path):
    """Pictures with and without LoRAs in one list: none leaves a trace in the next."""
    lines = [
        {"prompt": "a red apple"},
        {"prompt": "a red apple", "lora": "ink:0.5"},
        {"prompt": "a red apple", "lora": ["clay", "ink:-1"]},
        {"prompt": "a red apple <lora:clay:0.7>", "lora": []},
        {"prompt": "a red apple", "lora": "wrong"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    more = ("--out", tmp_path / "out", "--model", tiny_model, "--lora-dir", loras, *COMMON)
    result = gspn2("batch", tmp_path / "list.jsonl", *more)
    assert result.code == 3
    records = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    files = {record["index"]: record for record in records}
    assert "the LoRA 'wrong' cannot be used" in files[5]["error"]
    alone = {1: [], 2: ["ink:0.5"], 3: ["clay", "ink:-1"], 4: ["clay:0.7"]}
    contents = set()
    for index, names in alone.items():
        options = [option for name in names for option in ("--lora", name)]
        expected = draw(f"alone{index}", *options, "--lora-dir", loras).read_bytes()
        assert (tmp_path / "out" / files[index]["file"]).read_bytes() == expected
        assert files[index]["prompt"] == "a red apple"
        contents.add(expected)
    assert len(contents) == 4
    again = gspn2("batch", tmp_path / "list.jsonl", *more, "--json")
    drawn = [e for e in map(json.loads, again.out.splitlines()) if e["event"] == "picture"]
    assert [event["status"] for event in drawn] == ["failed"]  # the others are there


def test_verify_needs_the_same_files(gspn2, draw, tiny_model, loras, tmp_path):
    path = draw("picture", "--lora", "ink", "--lora-dir", loras)
    check = ("verify", path, "--model", tiny_model)
    assert gspn2(*check, "--lora-dir", loras).code == 0
    assert "bit for bit" in gspn2(*check, "--lora", loras / "ink.safetensors").out
    missing = gspn2(*check)
    assert (missing.code, len(missing.error_lines)) == (1, 1)
    assert "no LoRA 'ink'" in missing.err
    other = tmp_path / "other"
    other.mkdir()
    (other / "ink.safetensors").write_bytes((loras / "clay" / STANDARD_NAME).read_bytes())
    differs = gspn2(*check, "--lora-dir", other)
    assert differs.code == 3
    assert "LoRA ink" in differs.out


@pytest.mark.parametrize(
    ("option", "code", "words"),
    [
        ("nothing", 1, "no LoRA 'nothing'"),
        ("../ink", 1, "no LoRA"),
        ("broken", 1, "no safetensors file with weights"),
        ("ink:1,5", 2, "NAME:WEIGHT"),
        (":1", 2, "NAME:WEIGHT"),
        ("wrong", 1, "cannot be used"),
    ],
)
def test_wrong_loras_are_one_line(gspn2, tiny_model, loras, tmp_path, option, code, words):
    more = ("--model", tiny_model, *COMMON, "--lora", option, "--lora-dir", loras)
    result = gspn2("generate", "a", "-o", tmp_path / "x.png", *more)
    assert (result.code, len(result.error_lines)) == (code, 1), result.err
    assert words in result.err


def test_names_and_weights():
    assert parse_lora("ink") == ("ink", 1.0)
    assert parse_lora(" folder/ink.safetensors:-0.5") == ("folder/ink.safetensors", -0.5)
    assert parse_lora(r"C:\loras\ink.safetensors") == (r"C:\loras\ink.safetensors", 1.0)
    assert take_lora_tags("a <lora:ink> cat <lora:x:2>") == ("a cat", (("ink", 1.0), ("x", 2.0)))
    (entry,) = parse_prompts("a cat --lora ink:2, clay --d 3")
    assert entry == Entry("a cat", seed=3, loras=(("ink", 2.0), ("clay", 1.0)))
    assert [e.loras for e in parse_prompts("prompt,lora\na,ink\nb,none\nc,\n", "csv")] == [
        (("ink", 1.0),),
        (),
        None,
    ]
    for wrong in ("3", '"ink:1.2.3"', "[1]", '[":1"]', '{"ink": true}'):
        with pytest.raises(PromptError, match="line 1"):
            parse_prompts(f'{{"prompt": "a", "lora": {wrong}}}')


def test_damaged_records_are_refused(draw, loras):
    settings = read_settings(draw("plain"))
    text = settings.to_json().replace('"loras": []', '"loras": [{"name": "x", "sha256": "y"}]')
    with pytest.raises(MetadataError, match="LoRA"):
        type(settings).from_json(text)
