"""Configuration values and call arguments that must be refused, and the presets that must be accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_denoiser import CONFIG, make_inputs, make_model

from gspn2_diffusion import GSPN2Transformer2DModel

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "conv"}, r"mixer must be one of .*'conv'"),
        ({"mixer": ["gspn2"]}, "got 1 for num_layers=2"),
        ({"mixer": ["gspn2", "attn"]}, r"mixer must be one of .*'attn'"),
        ({"proxy_dim": 6, "num_weight_groups": 4}, "num_weight_groups must divide proxy_dim"),
        ({"proxy_dim": 0}, "proxy_dim must be a positive integer or None, got 0"),
        ({"chunk_size": -1}, "chunk_size must be"),
        ({"scan_directions": ["up", "sideways"]}, "directions must be"),
        ({"num_caption_layers": -1}, "num_caption_layers must be an integer of at least 0, got -1"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"patch_size": 1.5}, "patch_size must be a positive integer, got 1.5"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number"),
        ({"norm_eps": "tiny"}, "norm_eps must be a positive number, got 'tiny'"),
        ({"attention_head_dim": 6, "mixer": "softmax"}, "attention_head_dim must be a multiple of 4"),
        ({"cross_attention_inner_dim": 9}, "num_cross_attention_heads must divide cross_attention_inner_dim"),
        ({"pooled_projection_dim": True}, "pooled_projection_dim must be"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GSPN2Transformer2DModel(**{**CONFIG, **options})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", torch.randn(2, 3, 7, 10), "patch_size=2 divides, got 7 x 10"),
        ("hidden_states", torch.randn(2, 3, 6, 9), "patch_size=2 divides, got 6 x 9"),
        ("hidden_states", torch.randn(2, 4, 6, 10), r"hidden_states must be \(B, 3, H, W\)"),
        ("hidden_states", torch.randn(3, 6, 10), "hidden_states must be"),
        ("timestep", torch.zeros(3), "timestep must be"),
        ("encoder_hidden_states", torch.randn(2, 5, 11), r"encoder_hidden_states must be \(2, L, 12\)"),
        ("encoder_hidden_states", torch.randn(3, 5, 12), "encoder_hidden_states must be"),
        ("encoder_attention_mask", torch.ones(2, 4), r"encoder_attention_mask must be \(2, 5\)"),
        ("pooled_projections", torch.randn(2, 7), r"pooled_projections must be \(2, 6\)"),
        ("pooled_projections", None, "pooled_projections is required"),
    ],
)
def test_bad_inputs_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_inputs(), name: value})


def test_timestep_must_be_a_tensor():
    with pytest.raises(TypeError, match="timestep must be a tensor, got float"):
        make_model()(**{**make_inputs(), "timestep": 500.0})


def test_pooled_text_for_a_model_without_it_is_refused():
    model = make_model(pooled_projection_dim=None)
    with pytest.raises(ValueError, match="pooled_projections must be None"):
        model(**make_inputs())
    assert model(**make_inputs(pooled=False)).sample.shape == (2, 3, 6, 10)


def test_scan_directions_are_those_of_every_mixer():
    model = make_model(scan_directions=["down", "right"])
    assert {block.mixer.directions for block in model.transformer_blocks} == {("down", "right")}
    assert make_model().transformer_blocks[0].mixer.directions == ("down", "up", "right", "left")
    assert model(**make_inputs()).sample.shape == (2, 3, 6, 10)


def test_the_emoji_preset_fits_its_budget():
    config = json.loads((CONFIGS / "gspn2-emoji-transformer.json").read_text())
    with torch.device("meta"):
        model = GSPN2Transformer2DModel.from_config(config)
    assert set(config) - {"_class_name"} == {k for k in model.config if not k.startswith("_")}
    assert sum(p.numel() for p in model.parameters()) <= 22_000_000
    assert (model.config.sample_size // model.config.patch_size) == 16
    assert model.transformer_blocks[0].ff.net[2].in_features % 64 == 0


def test_the_softmax_baseline_is_the_same_model_but_for_the_mixer():
    models = {name: make_model(mixer=name) for name in ("gspn2", "softmax")}
    names = {
        kind: {n for n, _ in model.named_parameters() if ".mixer." not in n} for kind, model in models.items()
    }
    assert names["gspn2"] == names["softmax"]
