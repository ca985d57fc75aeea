"""Grown models compute what the small ones did, and learn in the new part."""

import copy

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.training.growth import GrowthError, grow_autoencoder, grow_denoiser


def wider(model, **changes):
    kept = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model).from_config(kept | changes)


@pytest.fixture(scope="module")
def denoisers():
    torch.manual_seed(3)
    small = tiny_models.tiny_transformer(num_layers=2)
    heads = small.config.num_cross_attention_heads or small.config.num_attention_heads
    inner = small.config.cross_attention_inner_dim or small.inner_dim
    large = wider(
        small,
        in_channels=small.config.in_channels + 3,
        num_cross_attention_heads=2 * heads,
        cross_attention_inner_dim=2 * inner,
        num_caption_layers=2,
    )
    return small, grow_denoiser(small, large)


def call(model, latents):
    config = model.config
    generator = torch.Generator().manual_seed(1)
    pooled = config.pooled_projection_dim
    return model(
        latents,
        timestep=torch.tensor([100.0, 900.0]),
        encoder_hidden_states=torch.randn(2, 5, config.caption_channels, generator=generator),
        pooled_projections=None if pooled is None else torch.randn(2, pooled, generator=generator),
    ).sample


def test_a_grown_denoiser_predicts_the_same_and_nothing_in_new_channels(denoisers):
    small, large = denoisers
    known = small.config.in_channels
    latents = torch.randn(2, known + 3, 8, 8)
    with torch.no_grad():
        before, after = call(small, latents[:, :known]), call(large, latents)
    assert torch.allclose(after[:, :known], before, atol=1e-5)
    assert float(after[:, known:].abs().max()) == 0.0
    assert float(before.abs().max()) > 0.01


def test_every_grown_part_gets_a_gradient(denoisers):
    _, large = denoisers
    large.zero_grad()
    call(large, torch.randn(2, large.config.in_channels, 8, 8)).square().sum().backward()
    block = large.transformer_blocks[0].cross_attn
    half = block.to_out[0].weight.shape[1] // 2
    assert float(block.to_out[0].weight.grad[:, half:].abs().max()) > 0
    call(large, torch.randn(2, large.config.in_channels, 8, 8)).sum().backward()
    assert float(large.proj_out.weight.grad.abs().max()) > 0
    for layer in large.caption_layers:
        assert float(layer.attn.to_out[0].weight.grad.abs().max()) > 0
        assert float(layer.ff.net[-1].weight.grad.abs().max()) > 0


def test_caption_layers_mix_words_but_not_padding(denoisers):
    """A changed word changes what the picture reads at other words; a masked one changes nothing."""
    _, large = denoisers
    layer = copy.deepcopy(large.caption_layers[0])  # the other tests look at the grown weights
    torch.nn.init.normal_(layer.attn.to_out[0].weight)
    words = torch.randn(1, 5, large.inner_dim)
    other = words.clone()
    other[0, 4] = torch.randn(large.inner_dim)
    bias = torch.zeros(large.num_cross_attention_heads, 1, 5)
    masked = bias.clone()
    masked[..., 4] = -10000.0
    with torch.no_grad():
        assert not torch.allclose(layer(words, bias)[:, :4], layer(other, bias)[:, :4], atol=1e-3)
        assert torch.equal(layer(words, masked)[:, :4], layer(other, masked)[:, :4])


def test_a_denoiser_of_another_build_is_refused(denoisers):
    small, large = denoisers
    with pytest.raises(GrowthError, match="mlp_ratio"):
        grow_denoiser(small, wider(small, mlp_ratio=5.0))
    with pytest.raises(GrowthError, match="smaller"):
        grow_denoiser(large, wider(small))


def test_a_grown_autoencoder_reconstructs_the_same_from_normalised_latents():
    torch.manual_seed(4)
    small = tiny_models.tiny_vae(use_quant_conv=False, use_post_quant_conv=False)
    small.register_to_config(scaling_factor=0.5, shift_factor=0.2)
    large = grow_autoencoder(small, wider(small, latent_channels=7, scaling_factor=1.0, shift_factor=None))
    pixels = torch.randn(2, 3, 32, 32)
    known = small.config.latent_channels
    with torch.no_grad():
        old, new = small.encode(pixels).latent_dist.mode(), large.encode(pixels).latent_dist.mode()
        assert torch.allclose(new[:, :known], (old - 0.2) * 0.5, atol=1e-5)
        assert float(new[:, known:].std()) > 0
        inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
        before, after = small.decode(old).sample, large.decode(new).sample
    assert after.shape == before.shape
    # the shift is exact inside; at the border the convolution pads with another zero
    assert float((after - before)[inside].abs().mean()) < 0.1 * float(before[inside].abs().mean())
    with pytest.raises(GrowthError, match="grow 7 latent channels into"):
        grow_autoencoder(large, wider(small))


def test_classes_are_those_of_the_pipeline(denoisers):
    assert isinstance(denoisers[1], GSPN2Transformer2DModel)
    assert isinstance(tiny_models.tiny_vae(), AutoencoderKL)
