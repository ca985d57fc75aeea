"""Pipelines whose configuration keeps line scans in balance at other sizes than that of training."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from gspn2_diffusion import GSPN2Img2ImgPipeline, GSPN2Pipeline
from gspn2_diffusion.pipelines.low_memory import balanced_scans
from gspn2_diffusion.pipelines.model_folders import resolve_model

NATIVE = 16  # pixels of the tiny model


@pytest.fixture(scope="module")
def pipes():
    """The same model with and without."""
    pair = [tiny_models.build_tiny_pipeline() for _ in range(2)]
    pair[1].register_to_config(balance_scans=True)
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
    return pair


def draw(pipe, height=NATIVE, width=NATIVE, **options):
    options = {"num_inference_steps": 2, "output_type": "np"} | options
    generator = torch.Generator().manual_seed(1)
    return pipe("a red apple", height=height, width=width, generator=generator, **options).images


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (12, 24)])
def test_other_sizes_are_drawn_in_balance(pipes, size):
    plain, balanced = pipes
    found = draw(balanced, *size)
    with balanced_scans(plain.transformer, size[0] // 2, size[1] // 2):
        wanted = draw(plain, *size)
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, draw(plain, *size))


def test_the_size_of_training_is_drawn_as_ever(pipes):
    plain, balanced = pipes
    assert np.array_equal(draw(balanced), draw(plain))


def test_balance_is_saved_and_shared(pipes, tmp_path):
    balanced = pipes[1]
    balanced.save_pretrained(tmp_path)
    loaded = GSPN2Pipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(loaded, 32, 32), draw(balanced, 32, 32))
    assert GSPN2Img2ImgPipeline.from_pipe(balanced).config.balance_scans is True


def test_layers_are_as_before_after_a_failing_call(pipes):
    def fail(*_):
        raise RuntimeError("on purpose")

    balanced = pipes[1]
    with pytest.raises(RuntimeError, match="on purpose"):
        draw(balanced, 32, 32, callback_on_step_end=fail)
    assert not any("forward" in module.__dict__ for module in balanced.transformer.modules())


def test_the_embedded_model_asks_for_it():
    index = Path(resolve_model("gspn2-emoji"), "model_index.json")
    assert json.loads(index.read_text())["balance_scans"] is True


def test_weights_that_are_offloaded_or_in_8_bits_are_balanced_in_full():
    """Sequential offload leaves parameters without memory, layerwise casting stores them in fewer bits."""
    model = tiny_models.tiny_transformer(sample_size=4)
    for changed in (model.to("meta"), tiny_models.tiny_transformer(sample_size=4).to(torch.float8_e4m3fn)):
        with balanced_scans(changed, 4, 6):
            scales = [block.mixer.direction_scale for block in changed.transformer_blocks]
        for scale in scales:
            assert scale.device.type == "cpu"
            torch.testing.assert_close(scale.unique(), torch.tensor([4 / 6, 1.0]))
        assert all(block.mixer.direction_scale is None for block in changed.transformer_blocks)
