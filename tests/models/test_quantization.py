"""Quantised weights through diffusers' configurations, with torchao (which also runs on a CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from tiny_denoiser import make_inputs, make_model
from tiny_models import build_tiny_pipeline

from gspn2_diffusion import GSPN2Pipeline, GSPN2Transformer2DModel

torchao = pytest.importorskip("torchao")
SCAN = "to_scan"


def config(**options: Any) -> TorchAoConfig:
    return TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig(version=2), **options)


def quantized(model: torch.nn.Module) -> set[str]:
    """Names of the linear layers whose weights are torchao's."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, torchao.utils.TorchAOBaseTensor)
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    make_model().save_pretrained(folder)
    return folder


def load(folder: Path, **options: Any) -> GSPN2Transformer2DModel:
    return GSPN2Transformer2DModel.from_pretrained(
        folder, quantization_config=config(**options), dtype=torch.float32
    ).eval()


def sample(model: GSPN2Transformer2DModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs()).sample


def test_eight_bit_weights(saved: Path) -> None:
    full, small = make_model(), load(saved)
    linear = {name for name, module in full.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantized(small) == linear
    assert small.num_parameters() == full.num_parameters()
    assert {small.get_parameter(f"{name}.weight").qdata.dtype for name in linear} == {torch.int8}
    error = (sample(small) - sample(full)).norm() / sample(full).norm()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="Casting a quantized model"):
        small.to(torch.float16)


def test_the_scan_can_be_left_out(saved: Path) -> None:
    small = load(saved, modules_to_not_convert=[SCAN])
    names = quantized(small)
    assert names
    assert not [name for name in names if SCAN in name]
    assert type(small.transformer_blocks[0].mixer.to_scan.weight) is torch.nn.Parameter


def test_lora_on_quantized_weights(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    small = load(saved)
    before = sample(small)
    small.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    after = sample(small)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-3


def test_a_pipeline_with_a_quantized_denoiser(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": config(modules_to_not_convert=[SCAN])})
    small = GSPN2Pipeline.from_pretrained(tmp_path, quantization_config=mapping)
    assert quantized(small.transformer)
    assert not quantized(small.vae)
    pictures = []
    for part in (pipe, small):
        part.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(
            part("a red apple", num_inference_steps=2, generator=generator, output_type="pt").images
        )
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < 0.05


def test_saving_and_loading_again(saved: Path, tmp_path: Path) -> None:
    small = load(saved)
    expected = sample(small)
    small.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("*pytorch_model*")] == [".safetensors"]
    again = GSPN2Transformer2DModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert quantized(again) == quantized(small)
    torch.testing.assert_close(sample(again), expected)
