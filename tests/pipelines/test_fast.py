"""The faster denoiser, as an option of every pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny_models
import torch

from gspn2_diffusion.pipelines.low_memory import balanced_scans, chunked_feed_forward


def test_only_on_a_gpu_and_never_without_effect() -> None:
    pipe = tiny_models.build_tiny_pipeline()
    with pytest.raises(ValueError, match="denoiser is on cpu"):
        pipe.enable_fast_denoiser()
    with pytest.raises(ValueError, match="at least one is needed"):
        pipe.enable_fast_denoiser(compile_blocks=False, cuda_graphs=False)
    pipe.disable_fast_denoiser()
    assert "forward" not in pipe.transformer.__dict__


@torch.no_grad()
def test_compiled_blocks_see_what_large_pictures_change() -> None:
    """Scans in balance and feed-forwards in chunks, begun and ended after the blocks were compiled."""
    plain = tiny_models.tiny_transformer(num_layers=10, sample_size=2).eval()
    model = copy.deepcopy(plain)
    graphs = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    latents, text = torch.randn(1, 4, 4, 4), torch.randn(1, 5, tiny_models.TEXT_CHANNELS)
    pooled = torch.randn(1, plain.config.pooled_projection_dim)
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": text}
    arguments["pooled_projections"] = pooled
    before = model(latents, **arguments).sample
    with balanced_scans(model, 4, 4), balanced_scans(plain, 4, 4), chunked_feed_forward(model, 3):
        found, wanted = (each(latents, **arguments).sample for each in (model, plain))
    # Chunks are matrix products of other shapes: ten layers of float32 rounding, not bits.
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(model(latents, **arguments).sample, before)
    assert len(graphs) == 2  # all ten blocks share one of each kind
    torch.compiler.reset()


@torch.no_grad()
def test_scans_in_balance_compile_once() -> None:
    """Every drawing at another size begins and ends a balance of its own."""
    model = tiny_models.tiny_transformer(num_layers=2, sample_size=2).eval()
    plain, graphs = copy.deepcopy(model), []

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=compiler)
    arguments = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, tiny_models.TEXT_CHANNELS),
        "pooled_projections": torch.randn(1, plain.config.pooled_projection_dim),
    }
    results = []
    for size in (4, 6, 4, 8):
        with balanced_scans(model, size, size), balanced_scans(plain, size, size):
            found, wanted = (each(**arguments).sample for each in (model, plain))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        results.append(found)
    assert not torch.allclose(results[0], results[1], atol=1e-5)
    assert len(graphs) == 1
    torch.compiler.reset()


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
