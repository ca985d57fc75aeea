"""What diffusers' ModelTesterMixin and TrainingTesterMixin check, on a fresh model as they build it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import EMAModel
from diffusers.utils import constants
from same_weights import assert_same_weights
from tiny_denoiser import CONFIG, make_inputs, make_model

from gspn2_diffusion import GSPN2Transformer2DModel

WEIGHTS = "diffusion_pytorch_model"


def fresh(**options: Any) -> GSPN2Transformer2DModel:
    torch.manual_seed(0)
    return GSPN2Transformer2DModel(**{**CONFIG, **options})


def output(model: GSPN2Transformer2DModel, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**make_inputs(), **changes}, return_dict=False)[0]


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {name for name, value in inputs.items() if name != "timestep" and value.is_floating_point()}
    return {name: value.to(dtype) if name in floating else value for name, value in inputs.items()}


def test_variant_is_another_file(tmp_path: Path) -> None:
    model = fresh().eval()
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / f"{WEIGHTS}.fp16.safetensors").is_file()
    again = GSPN2Transformer2DModel.from_pretrained(tmp_path, variant="fp16")
    assert_same_weights(again, model)
    torch.testing.assert_close(output(again), output(model))
    with pytest.raises(OSError, match="no file named"):
        GSPN2Transformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_survives_saving(tmp_path: Path, dtype: torch.dtype, low_memory: bool) -> None:
    model = fresh().eval().to(dtype)
    model.save_pretrained(tmp_path)
    again = GSPN2Transformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory, dtype=dtype)
    assert again.dtype == dtype
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert_same_weights(again, model)
    inputs = in_dtype(make_inputs(), dtype)
    found, wanted = output(again, **inputs), output(model, **inputs)
    assert found.dtype == dtype
    assert (found - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm()


def test_two_calls_are_equal() -> None:
    model = fresh().eval()
    assert torch.equal(output(model), output(model))
    assert torch.equal(output(model), model(**make_inputs()).sample)


def test_attributes_come_from_where_they_should(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh()
    model.dummy_attribute = 5
    model.register_to_config(test_attribute=6)
    with caplog.at_level(logging.WARNING):
        assert model.dummy_attribute == 5
        assert model.save_pretrained == model.save_pretrained
    assert caplog.text == ""
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 6
    with pytest.raises(
        AttributeError, match="'GSPN2Transformer2DModel' object has no attribute 'does_not_exist'"
    ):
        model.does_not_exist  # noqa: B018


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("parallel", [False, True])
def test_shards(tmp_path: Path, variant: str | None, parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh().eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=f"{size * 3 // 4096}KB", variant=variant)
    ending = "safetensors.index.json" if variant is None else f"safetensors.index.{variant}.json"
    assert (tmp_path / f"{WEIGHTS}.{ending}").is_file()
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(f"-of-{len(files):05}" in file for file in files)
    monkeypatch.setattr(constants, "HF_ENABLE_PARALLEL_LOADING", parallel)
    again = GSPN2Transformer2DModel.from_pretrained(tmp_path, variant=variant)
    assert_same_weights(again, model)
    torch.testing.assert_close(output(again), output(model))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu_survives_saving(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fresh().eval().to("cuda", dtype)
    model.save_pretrained(tmp_path)
    again = GSPN2Transformer2DModel.from_pretrained(tmp_path, dtype=dtype).to("cuda")
    inputs = {name: value.cuda() for name, value in in_dtype(make_inputs(), dtype).items()}
    assert torch.equal(output(again, **inputs), output(model, **inputs))


# Training


def test_a_step_with_an_average_of_the_weights() -> None:
    model = fresh().train()
    average = EMAModel(model.parameters(), decay=0.5)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    predicted = model(**make_inputs()).sample
    torch.nn.functional.mse_loss(predicted, torch.randn_like(predicted)).backward()
    optimizer.step()
    average.step(model.parameters())
    # EMAModel starts with a decay of (1 + 1) / (10 + 1) or less: between the old and the new weights.
    for old, new, mean in zip(before, model.parameters(), average.shadow_params, strict=True):
        low, high = torch.minimum(old, new), torch.maximum(old, new)
        assert ((mean >= low - 1e-6) & (mean <= high + 1e-6)).all()
    assert any((old != mean).any() for old, mean in zip(before, average.shadow_params, strict=True))


def test_gradient_checkpointing_can_be_switched() -> None:
    model = fresh()
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    applied = {
        type(module).__name__ for module in model.modules() if hasattr(module, "gradient_checkpointing")
    }
    assert applied == {"GSPN2Transformer2DModel"}
    assert all(module.gradient_checkpointing for module in model.modules() if module is model)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


# Attention processors, which only the cross-attention and the attention mixers have


@pytest.mark.parametrize("mixer", ["gspn2", "softmax", "linear"])
def test_fusing_and_unfusing_projections_changes_nothing(mixer: str) -> None:
    model = fresh(mixer=mixer).eval()
    expected = output(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(output(model), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(output(model), expected)


def test_processors_of_the_cross_attention_can_be_replaced() -> None:
    model = fresh().eval()
    expected, names = output(model), set(model.attn_processors)
    assert names == {f"transformer_blocks.{index}.cross_attn.processor" for index in range(2)}
    model.set_attn_processor({name: AttnProcessor2_0() for name in names})
    torch.testing.assert_close(output(model), expected)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(processor := AttnProcessor2_0())
            assert module.get_processor() is processor
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(names)): AttnProcessor()})


@pytest.mark.parametrize("mixer", ["gspn2", "softmax"])
def test_attention_backends_can_be_set(mixer: str) -> None:
    """They change nothing: the processors here always run torch's own attention."""
    model = fresh(mixer=mixer).eval()
    expected = output(model)
    with attention_backend("native"):
        assert torch.equal(output(model), expected)
    model.set_attention_backend("native")
    assert torch.equal(output(model), expected)
    model.reset_attention_backend()


def test_a_model_can_be_copied() -> None:
    model = make_model()
    assert torch.equal(output(copy.deepcopy(model)), output(model))
