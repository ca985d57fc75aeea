"""What diffusers' LoRA suite for models checks beyond test_diffusers_features.py: names and metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from tiny_denoiser import make_inputs, make_model

peft = pytest.importorskip("peft")

FILE = "pytorch_lora_weights.safetensors"


def with_adapter(**options: Any) -> Any:
    model = make_model()
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": False, **options}
    model.add_adapter(peft.LoraConfig(**settings))
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_saved_and_loaded_with_its_configuration(tmp_path: Path, dora: bool) -> None:
    model = with_adapter(use_dora=dora)
    with torch.no_grad():
        expected, plain = model(**make_inputs()).sample, make_model()(**make_inputs()).sample
        assert not torch.allclose(expected, plain, atol=1e-3)
        metadata = model.peft_config["default"].to_dict()
        model.save_lora_adapter(tmp_path)
        model.unload_lora()
        torch.testing.assert_close(model(**make_inputs()).sample, plain)
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        torch.testing.assert_close(model(**make_inputs()).sample, expected)
    assert model.peft_config["default_0"].to_dict() == metadata


def test_unknown_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Adapter name foo not found in the model"):
        with_adapter().save_lora_adapter(tmp_path, adapter_name="foo")


def test_metadata_with_unknown_keys(tmp_path: Path) -> None:
    model = with_adapter()
    model.save_lora_adapter(tmp_path)
    config = {**model.peft_config["default"].to_dict(), "foo": 1}
    config = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
    weights = safetensors.torch.load_file(tmp_path / FILE)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    safetensors.torch.save_file(weights, tmp_path / FILE, metadata=metadata)
    model.unload_lora()
    with pytest.raises(TypeError, match="`LoraConfig` class could not be instantiated"):
        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)


def test_room_for_swapping_is_made_before_the_first_adapter() -> None:
    with pytest.raises(RuntimeError, match="Call `enable_lora_hotswap` before loading the first adapter"):
        with_adapter().enable_lora_hotswap(target_rank=32)
    with pytest.raises(ValueError, match="got 'wrong' instead"):
        with_adapter().enable_lora_hotswap(target_rank=32, check_compiled="wrong")
    with_adapter().enable_lora_hotswap(target_rank=32, check_compiled="ignore")
