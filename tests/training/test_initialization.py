"""A denoiser that is trained from scratch starts at exactly zero; one that goes on keeps its weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tiny_models import tiny_transformer

from gspn2_diffusion.training.denoiser import load_denoiser

INPUTS: dict[str, Any] = {
    "hidden_states": torch.randn(1, 4, 8, 8),
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": torch.randn(1, 5, 16),
    "pooled_projections": torch.randn(1, 16),
}


def test_training_starts_at_zero_or_where_it_was(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.save_pretrained(tmp_path / "transformer")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    (tmp_path / "transformer.json").write_text(json.dumps(config), encoding="utf-8")
    options: Any = SimpleNamespace(
        init_from=None, mixer=None, transformer_config=str(tmp_path / "transformer.json")
    )
    with torch.no_grad():
        assert (load_denoiser(options)(**INPUTS).sample == 0).all()
        options.init_from = str(tmp_path / "transformer")
        torch.testing.assert_close(load_denoiser(options)(**INPUTS).sample, model(**INPUTS).sample)
