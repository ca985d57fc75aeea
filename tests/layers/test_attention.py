"""The attention mixers against plain formulas, and the rotary embedding's defining property."""

from __future__ import annotations

import pytest
import torch

from gspn2_diffusion.layers.attention import (
    AttentionMixer,
    axial_rotary_angles,
    make_cross_attention,
    rotate,
)


def make_attention(kind: str) -> AttentionMixer:
    torch.manual_seed(0)
    mixer = AttentionMixer(16, 2, kind)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


def _heads(mixer: AttentionMixer, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def rms(x, norm):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight

    q, k, v = (f(tokens).view(2, -1, 2, 8).transpose(1, 2) for f in (mixer.to_q, mixer.to_k, mixer.to_v))
    return rms(q, mixer.norm_q), rms(k, mixer.norm_k), v


def _out(mixer: AttentionMixer, heads: torch.Tensor) -> torch.Tensor:
    return mixer.to_out[0](heads.transpose(1, 2).reshape(2, -1, 16))


def test_linear_attention_is_its_formula():
    mixer, tokens = make_attention("linear"), torch.randn(2, 15, 16)
    q, k, v = _heads(mixer, tokens)
    scores = q.relu() @ k.relu().transpose(-1, -2)
    expected = _out(mixer, scores @ v / (scores.sum(-1, keepdim=True) + 1e-6))
    torch.testing.assert_close(mixer(tokens, 3, 5), expected)


def test_softmax_attention_is_its_formula():
    mixer, tokens = make_attention("softmax"), torch.randn(2, 15, 16)
    angles = axial_rotary_angles(3, 5, 8, torch.device("cpu"))
    q, k, v = _heads(mixer, tokens)
    scores = rotate(q, angles) @ rotate(k, angles).transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(mixer(tokens, 3, 5), _out(mixer, scores.softmax(-1) @ v))


def test_rotary_scores_depend_on_the_offset_only():
    height, width = 4, 6
    angles = axial_rotary_angles(height, width, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        at = [angles[row * width + column][None] for row, column in (a, b)]
        return (rotate(q.view(1, 1, 1, 8), at[0]) * rotate(k.view(1, 1, 1, 8), at[1])).sum()

    torch.testing.assert_close(score((0, 0), (2, 3)), score((1, 2), (3, 5)))
    assert not torch.isclose(score((0, 0), (2, 3)), score((0, 0), (3, 2)))
    torch.testing.assert_close(score((1, 1), (1, 1)), q @ k)


def test_softmax_attention_sees_positions_and_linear_does_not():
    tokens, order = torch.randn(2, 15, 16), torch.randperm(15)
    linear, softmax = make_attention("linear"), make_attention("softmax")
    torch.testing.assert_close(linear(tokens[:, order], 3, 5), linear(tokens, 3, 5)[:, order])
    assert not torch.allclose(softmax(tokens[:, order], 3, 5), softmax(tokens, 3, 5)[:, order], atol=1e-2)
    assert not torch.allclose(softmax(tokens, 3, 5), softmax(tokens, 5, 3), atol=1e-2)


def test_linear_attention_accumulates_in_float32_under_autocast():
    mixer = make_attention("linear")
    tokens = torch.randn(2, 4096, 16)
    expected = mixer(tokens, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(tokens, 64, 64)
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", ["softmax", "linear"])
def test_wrong_grid_is_named(kind):
    with pytest.raises(ValueError, match=r"height \* width must equal"):
        make_attention(kind)(torch.randn(2, 15, 16), 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 3, "softmax"), "heads must divide dim"),
        ((12, 2, "softmax"), "multiple of 4"),
        ((16, 2, "sparse"), "kind must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionMixer(*arguments)


def test_cross_attention_has_the_names_that_lora_looks_for():
    attention = make_cross_attention(16, 8, 2)
    names = {name for name, module in attention.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == {"to_q", "to_k", "to_v", "to_out.0"}
    assert attention.to_q.out_features == 8
    with pytest.raises(ValueError, match="num_cross_attention_heads"):
        make_cross_attention(16, 8, 3)
