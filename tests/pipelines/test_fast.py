"""The faster denoiser, as an option of every pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch


def test_only_on_a_gpu_and_never_without_effect() -> None:
    pipe = tiny_models.build_tiny_pipeline()
    with pytest.raises(ValueError, match="denoiser is on cpu"):
        pipe.enable_fast_denoiser()
    with pytest.raises(ValueError, match="at least one is needed"):
        pipe.enable_fast_denoiser(compile_blocks=False, cuda_graphs=False)
    pipe.disable_fast_denoiser()
    assert "forward" not in pipe.transformer.__dict__


@pytest.mark.gpu
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_the_same_pictures_on_a_gpu(compile_blocks: bool) -> None:
    pipe = tiny_models.build_tiny_pipeline().to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def draw(height: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        call = {"height": height, "width": 16, "num_inference_steps": 4, "output_type": "np"}
        return pipe("a red apple", generator=generator, **call).images

    before = [draw(16), draw(24)]
    pipe.enable_fast_denoiser(compile_blocks=compile_blocks)
    for height, wanted in zip((16, 24), before, strict=True):
        for _ in range(2):
            np.testing.assert_allclose(draw(height), wanted, atol=2e-3)
    assert len(pipe.transformer.__dict__["forward"]._graphs) == 2
    pipe.disable_fast_denoiser()
    np.testing.assert_allclose(draw(16), before[0], atol=2e-3)
