"""The block and its small parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gspn2_diffusion.layers.block import MIXERS, GSPN2TransformerBlock, make_mixer
from gspn2_diffusion.layers.embeddings import TimestepTextEmbedding
from gspn2_diffusion.layers.feed_forward import LocalPerceptionUnit, feed_forward_width, make_feed_forward


def make_block(mixer: str, **options) -> GSPN2TransformerBlock:
    torch.manual_seed(0)
    block = GSPN2TransformerBlock(16, 2, 2, 8, 2.0, mixer, proxy_dim=4, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return block


def inputs(height: int = 3, width: int = 5):
    torch.manual_seed(1)
    return torch.randn(2, height * width, 16), torch.randn(2, 4, 16), None, torch.randn(2, 96), height, width


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_block_is_its_four_residuals(mixer):
    block = make_block(mixer)
    x, text, bias, temb, height, width = inputs()
    out = block(x, text, bias, temb, height, width)
    table = torch.zeros(6, 16)
    table[-len(block.scale_shift_table) :] = block.scale_shift_table
    m = [part[:, None] for part in (temb.view(2, 6, 16) + table).unbind(1)]
    if mixer != "none":
        normed = F.layer_norm(x, (16,), eps=1e-6) * (1 + m[1]) + m[0]
        x = x + m[2] * block.mixer(normed, height, width)
    x = x + block.cross_attn(F.layer_norm(x, (16,), eps=1e-6), encoder_hidden_states=text)
    x = block.local_perception(x, height, width)
    x = x + m[5] * block.ff(F.layer_norm(x, (16,), eps=1e-6) * (1 + m[4]) + m[3])
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-4)


def test_a_block_without_a_mixer_keeps_tokens_apart_but_for_the_convolution():
    block = make_block("none", local_perception=False)
    x, text, bias, temb, height, width = inputs()
    changed = x.clone()
    changed[:, 0] += 1
    before = block(x, text, bias, temb, height, width)
    after = block(changed, text, bias, temb, height, width)
    assert torch.equal(before[:, 1:], after[:, 1:])
    assert not torch.allclose(before[:, 0], after[:, 0])
    assert block.mixer is None
    assert len(block.scale_shift_table) == 3


def test_local_perception_unit_is_a_residual_convolution_without_copies():
    unit = LocalPerceptionUnit(6)
    x = torch.randn(2, 15, 6)
    picture = x.transpose(1, 2).reshape(2, 6, 3, 5)
    expected = picture + F.conv2d(picture, unit.conv.weight, unit.conv.bias, padding=1, groups=6)
    torch.testing.assert_close(unit(x, 3, 5), expected.flatten(2).transpose(1, 2))
    seen = {}
    unit.conv.register_forward_pre_hook(lambda module, args: seen.update(pointer=args[0].data_ptr()))
    assert unit(x, 3, 5).is_contiguous()
    assert seen["pointer"] == x.data_ptr()


@pytest.mark.parametrize(("ratio", "width"), [(2.0, 768), (1.83, 704), (2.5, 960), (0.01, 32)])
def test_feed_forward_width(ratio, width):
    assert feed_forward_width(384, ratio) == width
    if ratio == 0.01:
        assert make_feed_forward(384, ratio).net[2].in_features == width


def test_timestep_embedding_tells_close_timesteps_apart_in_half_precision():
    embedding = TimestepTextEmbedding(32).to(torch.bfloat16)
    timestep = torch.tensor([900.0, 900.7])
    _, embedded = embedding(timestep, None, torch.bfloat16)
    assert embedded.dtype == torch.bfloat16
    assert not torch.equal(embedded[0], embedded[1])


def test_pooled_text_changes_the_modulation():
    embedding = TimestepTextEmbedding(32, 8)
    timestep, pooled = torch.tensor([500.0]), torch.randn(1, 8)
    modulation, embedded = embedding(timestep, pooled, torch.float32)
    assert modulation.shape == (1, 192)
    assert embedded.shape == (1, 32)
    assert not torch.allclose(modulation, embedding(timestep, pooled + 1, torch.float32)[0])


def test_unknown_mixer_is_named():
    with pytest.raises(ValueError, match=r"mixer must be one of.*'conv'"):
        make_mixer("conv", 16, 2, None, 1, None)
