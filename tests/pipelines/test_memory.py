"""Offloading, placing, casting and tiling a whole pipeline: what diffusers' MemoryTesterMixin checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from three_pipelines import CASES, Case
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

TEXT = CASES["text"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUPS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaf": {"offload_type": "leaf_level"},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def modules_of(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def close(drawn: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(drawn.cpu(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_model_offload(case: Case, device: str) -> None:
    expected, pipe = case.run(case.build()), case.build()
    for _ in range(2):  # a second time puts the hooks anew
        pipe.enable_model_cpu_offload(device=device)
        assert pipe._execution_device.type == device
        close(case.run(pipe), expected)
    assert {type(part._hf_hook).__name__ for part in modules_of(pipe).values()} == {"CpuOffload"}
    assert {part.device.type for part in modules_of(pipe).values()} == {"cpu"}


@pytest.mark.gpu
def test_sequential_offload(case: Case) -> None:
    expected, pipe = case.run(case.build()), case.build()
    for _ in range(2):
        pipe.enable_sequential_cpu_offload(device="cuda")
        close(case.run(pipe), expected)
    assert {part.device.type for part in modules_of(pipe).values()} == {"meta"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", GROUPS.values(), ids=GROUPS)
def test_group_offload_of_the_pipeline(options: dict[str, Any], device: str) -> None:
    expected, pipe = TEXT.run(TEXT.build(num_layers=3)), TEXT.build(num_layers=3)
    pipe.enable_group_offload(onload_device=torch.device(device), **options)
    for _ in range(2):
        close(TEXT.run(pipe), expected)


def test_group_offload_may_leave_components_out() -> None:
    pipe = TEXT.build()
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", exclude_modules="text_encoder"
    )
    hooked = {
        name
        for name, part in modules_of(pipe).items()
        if any(hasattr(module, "_diffusers_hook") for module in part.modules())
    }
    assert hooked == {"transformer", "vae"}


@pytest.mark.gpu
def test_group_offload_of_components_with_streams() -> None:
    expected, pipe = TEXT.run(TEXT.build(num_layers=3)), TEXT.build(num_layers=3)
    pipe.transformer.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True)
    pipe.vae.to("cuda")
    pipe.text_encoder.to("cuda")
    close(TEXT.run(pipe), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_layerwise_casting(device: str) -> None:
    pipe = TEXT.build().to(device, torch.bfloat16)
    expected = TEXT.run(pipe).float().cpu()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    drawn = TEXT.run(pipe).float().cpu()
    assert drawn.isfinite().all()
    assert 0 < (drawn - expected).abs().mean() < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_device_map_of_the_pipeline(tmp_path: Path, device_map: str) -> None:
    expected, pipe = TEXT.run(TEXT.build()), TEXT.build()
    pipe.save_pretrained(tmp_path)
    loaded = TEXT.kind.from_pretrained(tmp_path, device_map=device_map)
    assert {part.device.type for part in modules_of(loaded).values()} == {"cuda"}
    close(TEXT.run(loaded), expected)


def test_autoencoder_slicing_changes_nothing() -> None:
    pipe = TEXT.build()
    options = {"num_images_per_prompt": 2}
    expected, rows = TEXT.run(pipe, **options), []
    pipe.vae.enable_slicing()
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    torch.testing.assert_close(TEXT.run(pipe, **options), expected, atol=1e-5, rtol=0)
    assert rows == [1, 1]
    pipe.vae.disable_slicing()
    TEXT.run(pipe, **options)
    assert rows == [1, 1, 2]


def test_autoencoder_tiling_decodes_pieces(case: Case) -> None:
    pipe = case.build()
    options = {"height": 48, "width": 64}
    if case is CASES["inpaint"]:
        options["paste_unmasked"] = False
    if "image" in case.inputs:
        options["image"] = torch.nn.functional.interpolate(case.inputs["image"], (48, 64))
    if "mask_image" in case.inputs:
        options["mask_image"] = torch.nn.functional.interpolate(case.inputs["mask_image"], (48, 64))
    expected, sizes = case.run(pipe, **options), []
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 32, 16
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    drawn = case.run(pipe, **options)
    assert len(sizes) > 1
    assert max(max(size) for size in sizes) == 16
    assert drawn.shape == expected.shape == (1, 3, 48, 64)
    # The tiny autoencoder looks at whole pictures (attention, group norms), so pieces differ a little.
    assert (drawn - expected).abs().mean() < 0.15


OFFLOADS = {
    "groups": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level"
    ),
    "models": lambda pipe: pipe.enable_model_cpu_offload(),  # needs a GPU: loading LoRA puts it on anew
}


@pytest.mark.parametrize("how", ["groups", pytest.param("models", marks=pytest.mark.gpu)])
def test_lora_loads_into_offloaded_models(tmp_path: Path, how: str) -> None:
    peft = pytest.importorskip("peft")
    pipe = TEXT.build()
    plain = TEXT.run(pipe)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "to_proxy"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    expected = TEXT.run(pipe)
    pipe.save_lora_weights(tmp_path)
    other = TEXT.build()
    OFFLOADS[how](other)
    for _ in range(2):
        other.load_lora_weights(tmp_path)
        close(TEXT.run(other), expected)
        other.unload_lora_weights()
        close(TEXT.run(other), plain)


def test_pipelines_are_freed_after_a_call() -> None:
    """A model stays where offloading puts it also after an interrupted call."""
    pipe = build_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")

    def stop(pipeline: GSPN2Pipeline, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = True
        return tensors

    assert TEXT.run(pipe, callback_on_step_end=stop).shape == (1, 3, 16, 16)
    assert pipe.current_timestep is None
    assert {type(part._hf_hook).__name__ for part in modules_of(pipe).values()} == {"CpuOffload"}
