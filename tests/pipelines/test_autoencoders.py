"""The three autoencoders of diffusers: their spatial scale, and their own scaling of latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from tiny_models import build_tiny_pipeline, randomized, tiny_vae

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.sampling import vae_scale_factor


def tiny_dc() -> AutoencoderDC:
    widths = (8, 8, 8)
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.4,
    )
    return randomized(model, seed=4, std=0.2)


def tiny_taesd() -> AutoencoderTiny:
    widths, blocks = (8, 8, 8, 8), (1, 1, 1, 1)
    model = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    return randomized(model, seed=4, std=0.2)


def with_vae(vae: Any) -> GSPN2Pipeline:
    parts = build_tiny_pipeline()
    return GSPN2Pipeline(parts.tokenizer, parts.text_encoder, vae, parts.transformer, parts.scheduler, 12)


CASES = [
    (tiny_vae, 2, 0.5, 0.25),
    (lambda: tiny_vae(shift_factor=None), 2, 0.5, 0.0),
    (tiny_dc, 4, 0.4, 0.0),
    (tiny_taesd, 8, 1.5, 0.1),
]


@pytest.mark.parametrize(
    ("build", "scale", "factor", "shift"), CASES, ids=["kl", "kl-no-shift", "dc", "tiny"]
)
@torch.no_grad()
def test_size_and_scaling(build: Any, scale: int, factor: float, shift: float) -> None:
    vae = build()
    assert vae_scale_factor(vae) == scale
    pictures = torch.zeros(1, 3, 4 * scale, 6 * scale)
    encoded = vae.encode(pictures)[0]
    encoded = encoded if isinstance(encoded, torch.Tensor) else encoded.mode()
    assert encoded.shape[-2:] == (4, 6)  # the scale is what the autoencoder really does

    pipe = with_vae(vae)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 4 * scale, "width": 6 * scale}
    latents = pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent", **options).images
    assert latents.shape == (1, 4, 4, 6)
    expected = (vae.decode(latents / factor + shift).sample / 2 + 0.5).clamp(0, 1)
    drawn = pipe("a", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
    torch.testing.assert_close(drawn, expected)
    assert drawn.shape == (1, 3, 4 * scale, 6 * scale)
    assert pipe.default_size == 8 * scale
    with pytest.raises(ValueError, match=f"multiple of {2 * scale} pixels"):
        pipe("a", height=2 * scale + 1)
