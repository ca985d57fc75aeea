"""A cheap look at latents while they are being denoised: one matrix instead of a decoder."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image


class LatentPreview:
    """Colours from latents by a linear map, fitted once to the model's own autoencoder.

    The map is the least-squares solution between the latents of a picture of coloured patches and the colours
    themselves, with a constant term: ``rgb (h, w, 3) = latents (h, w, C) @ weight (C, 3) + bias (3)``.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight  # (C + 1, 3) float32 on the CPU, the last row is the constant

    @classmethod
    def fit(cls, pipe: Any) -> LatentPreview:
        """Encodes one picture of 8 x 8 patches with the pipeline's autoencoder."""
        scale, vae = pipe.vae_scale_factor, pipe.vae
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
        target = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="nearest")
        picture = torch.nn.functional.interpolate(target, scale_factor=scale, mode="nearest")
        with torch.no_grad():
            encoded = vae.encode(picture.to(vae.device, vae.dtype))
        latents = _mean_latents(encoded).float().cpu()
        latents = (latents - (vae.config.get("shift_factor", None) or 0.0)) * vae.config.scaling_factor
        rows = _with_constant(latents[0].permute(1, 2, 0).reshape(-1, latents.shape[1]))
        colours = target[0].permute(1, 2, 0).reshape(-1, 3)
        damping = 1e-3 * torch.eye(rows.shape[1])
        return cls(torch.linalg.solve(rows.T @ rows + damping, rows.T @ colours))

    def picture(self, latents: torch.Tensor) -> Image.Image:
        """``latents (C, h, w)`` as an RGB picture of ``w x h`` pixels."""
        channels, height, width = latents.shape
        rows = latents.detach().float().cpu().permute(1, 2, 0).reshape(-1, channels)
        rgb = (_with_constant(rows) @ self.weight).reshape(height, width, 3)
        array = ((rgb.nan_to_num() + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
        return Image.fromarray(array)


def _with_constant(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, torch.ones(rows.shape[0], 1)], dim=1)


def _mean_latents(encoded: Any) -> torch.Tensor:
    """What an autoencoder's ``encode`` returns: a distribution, or the latents themselves."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latent if hasattr(encoded, "latent") else encoded.latents


class CleanEstimate:
    """Where the sampling is heading: the clean latents implied by two successive noisy ones.

    With flow matching ``x = (1 - sigma) x0 + sigma noise`` moves by ``velocity * dsigma``, so that
    ``x0 = x - sigma * dx / dsigma``: far easier to recognise than ``x`` itself.
    """

    def __init__(self) -> None:
        self._before: tuple[torch.Tensor, float] | None = None
        self.latents: torch.Tensor | None = None

    def update(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """The estimate ``(C, h, w)`` after a step that ended at ``latents (C, h, w)`` and ``sigma``."""
        if self._before is not None and abs(self._before[1] - sigma) > 1e-6:
            x, s = self._before
            self.latents = latents - sigma * (latents - x) / (sigma - s)
        elif self.latents is None:
            self.latents = latents
        self._before = (latents, sigma)
        return self.latents


def data_uri(picture: Image.Image, side: int = 192) -> str:
    """A small JPEG inside a ``data:`` address, enlarged smoothly to about ``side`` pixels."""
    scale = max(1, side // max(picture.size))
    enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    enlarged.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
