"""What the denoiser is asked to predict, and at which noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.losses import draw_sigmas

_STEPS = 1000


@dataclass
class Question:
    """Noisy latents and what the model should answer.

    Attributes:
        noisy: (B, C, H, W).
        timestep: (B,), as the model takes it.
        target: (B, C, H, W) float32.
        weight: (B,), of each picture's squared error.
    """

    noisy: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor

    def ask(self, model: nn.Module, conditions: dict[str, Any]) -> Tensor:
        """The model's answer, float32."""
        return model(self.noisy, timestep=self.timestep, return_dict=False, **conditions)[0].float()

    def errors(self, answer: Tensor) -> Tensor:
        """Weighted mean squared error of each picture, (B,); a learned variance is left out."""
        error = answer[:, : self.target.shape[1]] - self.target
        return self.weight * error.pow(2).mean(dim=(1, 2, 3))


class FlowMatching:
    """``x_t = (1 - sigma) x_0 + sigma noise``, the answer is ``noise - x_0`` at ``1000 sigma``.

    Levels follow the densities of the SD3 paper (arXiv 2403.03206, section 3.1), shifted by
    ``train_shift * sqrt(pixels / shift_base_resolution**2)`` (its section 5.3.2).

    Args:
        config: weighting, shifts.
        vae_scale: pixels per latent along a side.
    """

    def __init__(self, config: DenoiserConfig, vae_scale: int) -> None:
        self._config, self._vae_scale = config, vae_scale

    def shift(self, height: int, width: int) -> float:
        """Shift for latents of a size."""
        base = self._config.shift_base_resolution
        if base is None:
            return self._config.train_shift
        return self._config.train_shift * (height * width) ** 0.5 * self._vae_scale / base

    def draw(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Noise levels in 0..1 for a batch, (B,)."""
        return draw_sigmas(
            len(latents),
            weighting=self._config.weighting,
            logit_mean=self._config.logit_mean,
            logit_std=self._config.logit_std,
            shift=self.shift(*latents.shape[-2:]),
            device=latents.device,
            generator=generator,
        )

    def question(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Question:
        """Noise latents to levels in 0..1."""
        level = levels.view(-1, 1, 1, 1)
        noisy = (1 - level) * latents + level * noise
        return Question(noisy, levels * _STEPS, noise - latents, torch.ones_like(levels))


class NoisePrediction:
    """DDPM training of older models: the answer is the noise, or v, weighted by min-SNR.

    min-SNR (arXiv 2303.09556): ``min(snr, gamma)`` over ``snr`` for epsilon and over ``snr + 1`` for v.

    Args:
        config: ``prediction`` and ``min_snr_gamma``.
        scheduler: configuration of the model's scheduler, for its betas.
    """

    def __init__(self, config: DenoiserConfig, scheduler: dict[str, Any] | None = None) -> None:
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        known = {key: value for key, value in (scheduler or {}).items() if key in names}
        made: Any = DDPMScheduler(
            **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **known}
        )
        self._kept = made.alphas_cumprod
        self._velocity = config.prediction == "v_prediction"
        self._gamma = config.min_snr_gamma

    def draw(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Evenly spread levels, (B,)."""
        return torch.rand(len(latents), device=latents.device, generator=generator)

    def question(self, latents: Tensor, noise: Tensor, levels: Tensor) -> Question:
        """Noise latents to levels in 0..1, the share of the training timesteps."""
        steps = (levels * len(self._kept)).long().clamp(max=len(self._kept) - 1)
        kept = self._kept.to(latents.device)[steps]
        signal, spread = (part.sqrt().view(-1, 1, 1, 1) for part in (kept, 1 - kept))
        noisy = signal * latents + spread * noise
        target = signal * noise - spread * latents if self._velocity else noise
        return Question(noisy, steps, target, self._weight(kept / (1 - kept)))

    def _weight(self, snr: Tensor) -> Tensor:
        if self._gamma is None:
            return torch.ones_like(snr)
        capped = snr.clamp(max=self._gamma)
        return capped / (snr + 1) if self._velocity else capped / snr


Objective = FlowMatching | NoisePrediction


def make_objective(
    config: DenoiserConfig, vae_scale: int, scheduler: dict[str, Any] | None = None
) -> Objective:
    """The objective that the settings ask for."""
    if config.prediction == "flow":
        return FlowMatching(config, vae_scale)
    return NoisePrediction(config, scheduler)
