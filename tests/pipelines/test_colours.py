"""Colours stay those of the first stage."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from gspn2_diffusion import GSPN2SuperResPipeline
from gspn2_diffusion.pipelines.colours import colour_map


def scene(side: int = 96) -> torch.Tensor:
    """Smooth colours of all kinds, ``(1, 3, side, side)``."""
    rough = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return F.interpolate(rough, size=side, mode="bilinear", align_corners=True)


def test_colours_that_drifted_come_back():
    wanted = scene()
    drift = torch.tensor([[0.9, 0.05, 0.0], [-0.06, 0.85, 0.1], [0.02, 0.0, 0.95]])
    drifted = torch.einsum("ij,bjhw->bihw", drift, wanted) + torch.tensor([0.1, -0.05, 0.0])[:, None, None]
    drifted = F.interpolate(drifted, size=150, mode="bilinear")  # another size, 150 rows in three parts
    colours = colour_map(drifted, wanted)
    back = colours.apply_(drifted.clone())
    expected = F.interpolate(wanted, size=150, mode="bilinear")
    assert (drifted - expected).abs().mean() > 0.05
    assert (back - expected).abs().mean() < 0.01


def test_noise_takes_no_contrast_away():
    wanted = scene()
    noisy = 0.9 * wanted + 0.2 * torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    matrix = colour_map(noisy, wanted).matrix
    torch.testing.assert_close(matrix.diag(), torch.full((3,), 1 / 0.9).double(), rtol=0.03, atol=0)


def test_one_colour_is_only_shifted():
    grey = torch.full((1, 3, 8, 8), 0.2)
    colours = colour_map(grey + 0.1, grey)
    torch.testing.assert_close(colours.matrix, torch.eye(3).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(colours.apply_(grey + 0.1), grey)


def test_another_picture_is_left_alone(caplog):
    with caplog.at_level(logging.INFO, logger="gspn2_diffusion"):
        assert colour_map(-scene(), scene()) is None
    assert "colours are left as they are" in caplog.text
    assert colour_map(scene() * float("nan"), scene()) is None


@torch.no_grad()
def test_the_pipeline_keeps_the_colours_of_its_first_stage(monkeypatch, tmp_path):
    """The embedded autoencoder, and a stage that takes a part of the contrast away; also in a file."""
    pipe = GSPN2SuperResPipeline.from_pretrained("gspn2-emoji")
    pipe.set_progress_bar_config(disable=True)
    contrast = 1.0
    monkeypatch.setattr(pipe, "_refine", lambda call, latents, *_: contrast * latents)
    given = F.interpolate(scene(), size=256, mode="bilinear") / 2 + 0.5

    def draw(**options: Any) -> torch.Tensor:
        made = pipe("shapes", image=given[..., ::2, ::2], height=256, width=256, output_type="pt", **options)
        return made.images

    def error(picture: torch.Tensor) -> float:
        return (F.adaptive_avg_pool2d(picture, 16) - F.adaptive_avg_pool2d(wanted, 16)).abs().mean().item()

    wanted = draw(keep_colours=False)
    contrast = 0.8
    kept, drifted = draw(), draw(keep_colours=False)
    assert error(kept) < 0.5 * error(drifted)
    assert pipe._drawn is None
    draw(output_path=tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as file:
        written = torch.from_numpy(np.asarray(file) / 255).permute(2, 0, 1)[None]
    torch.testing.assert_close(written.float(), kept, atol=1e-6, rtol=0)
