"""The few-step adapter in a model's folder: on, off, beside other LoRAs, saved and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from same_weights import assert_same_weights
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.model_folders import FEW_STEPS_FILE, own_sampling
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline

peft = pytest.importorskip("peft")


def adapter(folder: Path, seed: int, *targets: str) -> Path:
    """A folder with a trained-looking adapter on the layers with these names."""
    pipe = build_tiny_pipeline()
    pipe.transformer.add_adapter(peft.LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in pipe.transformer.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pipe.save_lora_weights(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` with a few-step adapter, and the LoRAs ``ink`` and ``clay`` on other layers."""
    folder = tmp_path_factory.mktemp("few-steps")
    adapter(folder / "few", 1, "to_scan", "proj_out", "linear_1")
    adapter(folder / "ink", 2, "to_q", "to_scan")
    adapter(folder / "clay", 3, "to_proxy")
    pipe = build_tiny_pipeline()
    pipe.add_few_steps(folder / "few", 3)
    pipe.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def pipe(root: Path) -> GSPN2Pipeline:
    loaded = GSPN2Pipeline.from_pretrained(root / "model")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: Any, **settings: Any) -> torch.Tensor:
    """Latents of one picture."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", generator=generator, output_type="latent", **settings).images


def test_on_and_off(root: Path, pipe: GSPN2Pipeline) -> None:
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    before = draw(pipe, num_inference_steps=3, guidance_scale=1.0)
    keys = list(pipe.transformer.state_dict())
    pipe.enable_few_steps()
    pipe.enable_few_steps()  # twice is once
    assert pipe.few_steps_enabled
    calls.clear()
    few = draw(pipe)
    assert calls == [1, 1, 1]  # its own steps, no guidance
    assert (few - before).abs().max() > 0.01
    named = GSPN2Pipeline.from_pretrained(root / "model")
    named.load_lora_weights(root / "few")
    wanted = draw(named, num_inference_steps=3, guidance_scale=1.0)
    torch.testing.assert_close(few, wanted, atol=1e-4, rtol=0)
    calls.clear()
    draw(pipe, num_inference_steps=2, guidance_scale=3.0)
    assert calls == [2, 2]
    pipe.disable_few_steps()
    assert not pipe.few_steps_enabled
    assert torch.equal(before, draw(pipe, num_inference_steps=3, guidance_scale=1.0))
    assert list(pipe.transformer.state_dict()) == keys
    calls.clear()
    draw(pipe)
    assert calls == [2] * 20


def test_beside_other_loras(root: Path, pipe: GSPN2Pipeline) -> None:
    """Any order of switching gives the picture of the adapters that are on."""
    few = {"num_inference_steps": 3, "guidance_scale": 1.0}
    expected: dict[str, torch.Tensor] = {}
    other = GSPN2Pipeline.from_pretrained(root / "model")
    other.set_progress_bar_config(disable=True)
    expected["none"] = draw(other, **few)
    for name in ("few", "ink", "clay"):
        other.load_lora_weights(root / name, adapter_name=name)
    for names in (["few"], ["ink"], ["few", "ink"], ["few", "clay"]):
        other.set_adapters(names, [0.5 if name == "ink" else 1.0 for name in names])
        expected["+".join(names)] = draw(other, **few)

    def check(name: str) -> None:
        found = draw(pipe, **few)
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=0)
        assert min((found - value).abs().max() for key, value in expected.items() if key != name) > 0.01

    pipe.load_lora_weights(root / "ink", adapter_name="ink")
    pipe.set_adapters("ink", 0.5)
    pipe.enable_few_steps()
    check("few+ink")
    pipe.disable_lora()
    check("few")
    pipe.enable_lora()
    check("few+ink")
    pipe.disable_few_steps()
    check("ink")
    pipe.enable_few_steps()
    pipe.load_lora_weights(root / "clay", adapter_name="clay")  # the newest alone is active, as always
    check("few+clay")
    pipe.set_adapters(["ink"], [0.5])
    check("few+ink")
    pipe.delete_adapters("ink")
    pipe.unload_lora_weights()
    check("few")
    pipe.disable_few_steps()
    pipe.load_lora_weights(root / "ink", adapter_name="ink")
    pipe.disable_lora()
    pipe.enable_few_steps()
    check("few")
    pipe.disable_few_steps()
    check("none")


def test_saved_while_on_and_found_from_every_pipeline(
    root: Path, pipe: GSPN2Pipeline, tmp_path: Path
) -> None:
    pipe.enable_few_steps()
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "again")
    assert pipe.few_steps_enabled
    for name in (FEW_STEPS_FILE, "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (root / "model" / name).read_bytes()
    again = GSPN2Pipeline.from_pretrained(tmp_path / "again")
    assert_same_weights(again, GSPN2Pipeline.from_pretrained(root / "model"))
    again.enable_few_steps()
    torch.testing.assert_close(draw(again), expected, atol=1e-4, rtol=0)
    image = torch.zeros(1, 3, 16, 16)
    from_picture = GSPN2Img2ImgPipeline.from_pipe(pipe)
    assert from_picture.few_steps_enabled  # the transformer is shared
    from_picture.disable_few_steps()
    assert not pipe.few_steps_enabled
    from_picture.enable_few_steps()
    from_picture.set_progress_bar_config(disable=True)
    assert torch.isfinite(draw(from_picture, image=image, strength=0.5)).all()
    assert from_picture.num_timesteps == 2  # of its three


def test_errors_say_what_is_wrong(root: Path, pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    plain = build_tiny_pipeline()
    with pytest.raises(ValueError, match="this model has no few-step adapter"):
        plain.enable_few_steps()
    plain.disable_few_steps()
    with pytest.raises(FileNotFoundError, match="is missing"):
        plain.add_few_steps(tmp_path, 4)
    with pytest.raises(ValueError, match="`steps` must be an integer of at least 1, got 0"):
        plain.add_few_steps(root / "few", 0)
    with pytest.raises(ValueError, match=r"for another model|made for weights"):
        build_tiny_pipeline(num_attention_heads=1).add_few_steps(root / "few", 4)
    pipe.enable_few_steps()
    for name in ("add_few_steps", "fuse_lora"):
        with pytest.raises(ValueError, match=r"call `disable_few_steps\(\)` first"):
            getattr(pipe, name)(*((root / "few", 4) if name == "add_few_steps" else ()))
    with pytest.raises(ValueError, match="reserved"):
        pipe.delete_adapters("few_steps")
    pipe.disable_few_steps()
    with pytest.raises(ValueError, match="reserved"):
        pipe.load_lora_weights(root / "ink", adapter_name="few_steps")
    pipe.load_lora_weights(root / "ink", adapter_name="ink")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        pipe.enable_few_steps()


def test_damage_shows_when_the_model_is_loaded(root: Path, pipe: GSPN2Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    (tmp_path / FEW_STEPS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0not JSON at all")
    with pytest.raises(OSError, match="damaged or cut short"):
        GSPN2Pipeline.from_pretrained(tmp_path)
    (tmp_path / FEW_STEPS_FILE).unlink()
    without = GSPN2Pipeline.from_pretrained(tmp_path)  # draws all the same
    with pytest.raises(FileNotFoundError, match=r"few-step adapter .* is missing"):
        without.enable_few_steps()


def test_a_model_of_the_hub_has_it_in_its_snapshot(root: Path, tmp_path: Path) -> None:
    """Out of a cache such as a download leaves: the adapter is no component, so it is looked for apart."""
    import shutil

    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "models--somebody--few"
    shutil.copytree(root / "model", store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    hub = {"cache_dir": str(tmp_path), "local_files_only": True}
    pipe = GSPN2Pipeline.from_pretrained("somebody/few", trust_remote_code=True, **hub)
    pipe.enable_few_steps()
    assert pipe.few_steps_enabled


def test_settings_of_a_call(root: Path) -> None:
    config = json.loads((root / "model" / "model_index.json").read_text())
    assert own_sampling(config, None, None) == (20, 4.0)
    assert own_sampling(config, None, None, few_steps=True) == (3, 1.0)
    assert own_sampling(config, 5, 2.0, few_steps=True) == (5, 2.0)
