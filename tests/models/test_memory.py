"""Offloading, placing and casting a model's weights: what diffusers' MemoryTesterMixin checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from tiny_denoiser import make_inputs, make_model
from torch import nn

from gspn2_diffusion import GSPN2Transformer2DModel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUPS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}
FULL = ("patch_embed", "time_embed", "norm", "to_scan", "proj_out")


def output(model: nn.Module, device: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value.to(device) for name, value in make_inputs().items()}).sample.cpu()


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_group_offload_changes_nothing(
    tmp_path: Path, options: dict[str, Any], on_disk: bool, device: str
) -> None:
    expected, model = output(make_model(num_layers=3)), make_model(num_layers=3)
    if on_disk:
        options = {**options, "offload_to_disk_path": str(tmp_path)}
    model.enable_group_offload(torch.device(device), **options)
    hooked = [module for module in model.modules() if hasattr(module, "_diffusers_hook")]
    assert len(hooked) > 3
    assert all(module._diffusers_hook.get_hook("group_offloading") is not None for module in hooked)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 3 * on_disk
    for _ in range(2):
        torch.testing.assert_close(output(model, device), expected, atol=1e-3, rtol=0)
    assert {parameter.device.type for parameter in model.transformer_blocks[2].ff.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("record_stream", [False, True])
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
def test_group_offload_with_a_stream(options: dict[str, Any], record_stream: bool) -> None:
    expected, model = output(make_model(num_layers=3)), make_model(num_layers=3)
    model.enable_group_offload(torch.device("cuda"), use_stream=True, record_stream=record_stream, **options)
    for _ in range(3):
        torch.testing.assert_close(output(model, "cuda"), expected, atol=1e-3, rtol=0)


def test_group_offload_with_layerwise_casting() -> None:
    model = make_model(num_layers=3)
    expected = output(model)
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    torch.testing.assert_close(output(model), expected, atol=0.02, rtol=0.02)


def test_sequential_offload_keeps_nothing_on_the_device() -> None:
    """As enable_sequential_cpu_offload does it to every component of a pipeline."""
    model = make_model()
    expected = output(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "weights only"])
def test_device_map_splits_between_memory_and_disk(tmp_path: Path, safe: bool) -> None:
    model = make_model(num_layers=3)
    expected = output(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": int(size_of(model) * 0.6)}}
    if not safe:
        with pytest.raises(ValueError, match="offload_folder"):
            GSPN2Transformer2DModel.from_pretrained(tmp_path, **options)
    split = GSPN2Transformer2DModel.from_pretrained(
        tmp_path, offload_folder=str(tmp_path / "disk"), **options
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    assert {parameter.device.type for parameter in split.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(output(split.eval()), expected)


def test_device_map_by_block(tmp_path: Path) -> None:
    model = make_model(num_layers=3)
    expected = output(model)
    model.save_pretrained(tmp_path)
    places = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    places |= {f"transformer_blocks.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    split = GSPN2Transformer2DModel.from_pretrained(
        tmp_path, device_map={**places, "scale_shift_table": "cpu"}, offload_folder=str(tmp_path / "disk")
    )
    assert {p.device.type for p in split.transformer_blocks[1].parameters()} == {"meta"}
    assert {p.device.type for p in split.transformer_blocks[2].parameters()} == {"cpu"}
    torch.testing.assert_close(output(split.eval()), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("part", [0.5, 0.7])
def test_device_map_splits_between_gpu_and_cpu(tmp_path: Path, part: float) -> None:
    model = make_model(num_layers=4)
    expected, size = output(model), size_of(model)
    model.save_pretrained(tmp_path)
    split = GSPN2Transformer2DModel.from_pretrained(
        tmp_path, device_map="auto", max_memory={0: int(part * size), "cpu": 2 * size}
    )
    assert set(split.hf_device_map.values()) == {0, "cpu"}
    torch.testing.assert_close(output(split.eval(), "cuda"), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_spares_norms_and_the_scan(dtype: torch.dtype) -> None:
    model = make_model(num_layers=1)
    expected, whole = output(model), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32)
    eight = {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}
    full = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    block = "transformer_blocks.0."
    cast = {
        f"{block}{name}.weight" for name in ("ff.net.2", "cross_attn.to_q", "mixer.to_proxy", "mixer.to_out")
    }
    assert cast <= eight
    assert not [name for name in eight if any(part in name for part in FULL)]
    kept = {f"{block}mixer.to_scan.weight", f"{block}cross_attn.norm_q.weight", f"{block}scale_shift_table"}
    assert kept | {"proj_out.weight", "patch_embed.weight", "caption_norm.weight"} <= full
    assert (output(model) - expected).norm() < (
        0.2 if dtype == torch.float8_e4m3fn else 0.4
    ) * expected.norm()
    in_eight = sum(model.get_parameter(name).numel() for name in eight)
    assert model.get_memory_footprint() == whole - 3 * in_eight


def test_layerwise_casting_needs_less_memory_with_each_smaller_dtype() -> None:
    footprints = []
    for storage, compute in (
        (torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
    ):
        model = make_model().to(compute)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
        footprints.append(model.get_memory_footprint())
    assert footprints[0] > footprints[1] > footprints[2]


@pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_layerwise_casting_in_training(storage: torch.dtype) -> None:
    model = make_model().train()
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predicted = model(**make_inputs()).sample
    predicted.float().square().mean().backward()
    scan = model.transformer_blocks[0].mixer.to_scan.weight
    assert scan.dtype == torch.float32
    assert scan.grad is not None
    assert (scan.grad != 0).any()
