"""What diffusers' LoRA suite for pipelines checks beyond test_lora.py: several at once, off, and again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from three_pipelines import CASES

peft = pytest.importorskip("peft")

TEXT = CASES["text"]
NAMES = ["to_q", "to_k", "to_v", "to_out.0"]


def add(pipe: Any, name: str = "default", **options: Any) -> None:
    torch.manual_seed(len(name) + sum(map(ord, name)))
    settings = {"r": 4, "lora_alpha": 4, "target_modules": NAMES, "init_lora_weights": False, **options}
    pipe.transformer.add_adapter(peft.LoraConfig(**settings), adapter_name=name)


def close(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


def differ(drawn: torch.Tensor, other: torch.Tensor) -> None:
    assert not torch.allclose(drawn, other, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return TEXT.run(TEXT.build())


def test_fusing_one_or_several(plain: torch.Tensor) -> None:
    pipe = TEXT.build()
    add(pipe, "one")
    add(pipe, "two")
    expected = {}
    for names in (["one"], ["one", "two"]):
        pipe.set_adapters(names)
        expected[len(names)] = TEXT.run(pipe)
        differ(expected[len(names)], plain)
    differ(expected[1], expected[2])
    for names in (["one"], ["two", "one"]):
        pipe.fuse_lora(components=pipe._lora_loadable_modules, adapter_names=names)
        assert pipe.num_fused_loras == len(names)
        close(TEXT.run(pipe), expected[len(names)])
        pipe.unfuse_lora(components=pipe._lora_loadable_modules)
        assert pipe.num_fused_loras == 0


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_scale_of_a_call_equals_scale_of_fusing(plain: torch.Tensor, scale: float) -> None:
    pipe = TEXT.build()
    add(pipe)
    expected = TEXT.run(pipe, attention_kwargs={"scale": scale})
    differ(expected, plain)
    pipe.fuse_lora(lora_scale=scale)
    close(TEXT.run(pipe), expected)


def test_disabling_deleting_and_adding_again(tmp_path: Path, plain: torch.Tensor) -> None:
    pipe = TEXT.build()
    add(pipe, "one")
    add(pipe, "two")
    assert pipe.get_active_adapters() == ["two"]
    pipe.set_adapters(["one", "two"], [0.5, 0.6])
    assert pipe.get_active_adapters() == ["one", "two"]
    mixed = TEXT.run(pipe)
    pipe.disable_lora()
    close(TEXT.run(pipe), plain)
    pipe.enable_lora()
    close(TEXT.run(pipe), mixed)
    pipe.save_lora_weights(tmp_path, adapter_name="one")
    pipe.set_adapters("one")
    one = TEXT.run(pipe)
    pipe.delete_adapters(["one", "two"])
    close(TEXT.run(pipe), plain)
    for low_memory in (False, True):
        pipe.load_lora_weights(tmp_path, adapter_name="again", low_cpu_mem_usage=low_memory)
        close(TEXT.run(pipe), one)
        pipe.unload_lora_weights()
        close(TEXT.run(pipe), plain)
    add(pipe)
    differ(TEXT.run(pipe), plain)


def test_weights_for_components_that_are_not_there(caplog: pytest.LogCaptureFixture) -> None:
    pipe = TEXT.build()
    add(pipe)
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    try:
        pipe.set_adapters("default", adapter_weights={"foo": 0.0, "bar": 0.0})
    finally:
        logger.propagate = False
    assert "are not part of the pipeline: ['bar', 'foo']" in caplog.text


def test_a_file_without_layers_changes_nothing(plain: torch.Tensor) -> None:
    pipe = TEXT.build()
    pipe.load_lora_weights({"lora_foo": torch.tensor(2.0), "lora_bar": torch.tensor(3.0)})
    assert torch.equal(TEXT.run(pipe), plain)


@pytest.mark.parametrize("alpha", [4, 8, 16])
def test_metadata_comes_back(tmp_path: Path, alpha: int) -> None:
    pipe = TEXT.build()
    add(pipe, lora_alpha=alpha)
    metadata = pipe.transformer.peft_config["default"].to_dict()
    expected = TEXT.run(pipe)
    type(pipe).save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.utils.get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=metadata,
    )
    pipe.unload_lora_weights()
    _, parsed = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    own = {key.removeprefix("transformer."): value for key, value in parsed.items()}
    assert (own["r"], own["lora_alpha"], set(own["target_modules"])) == (4, alpha, set(NAMES))
    assert set(own) == set(metadata)
    pipe.load_lora_weights(tmp_path)
    close(TEXT.run(pipe), expected)
