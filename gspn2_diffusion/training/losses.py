"""Training losses: picture reconstruction for the autoencoder, flow matching for the denoiser."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn


def edge_loss(found: Tensor, wanted: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of horizontal and vertical differences, at full size and halved sizes.

    Args:
        found: (B, 3, H, W).
        wanted: (B, 3, H, W).
        scales: picture sizes that are compared.
    """
    total = found.new_zeros(())
    error = found - wanted  # differences are linear, so the error can be differenced once
    for scale in range(scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return total / scales


def ssim_loss(found: Tensor, wanted: Tensor, window: int = 7) -> Tensor:
    """One minus structural similarity with a square window, for pictures in -1..1.

    Args:
        found: (B, 3, H, W).
        wanted: (B, 3, H, W).
        window: side of the window in pixels.
    """
    steady, lively = (2 * 0.01) ** 2, (2 * 0.03) ** 2
    mean_f, mean_w = F.avg_pool2d(found, window, 1), F.avg_pool2d(wanted, window, 1)
    var_f = F.avg_pool2d(found * found, window, 1) - mean_f * mean_f
    var_w = F.avg_pool2d(wanted * wanted, window, 1) - mean_w * mean_w
    both = F.avg_pool2d(found * wanted, window, 1) - mean_f * mean_w
    light = (2 * mean_f * mean_w + steady) / (mean_f * mean_f + mean_w * mean_w + steady)
    shape = (2 * both + lively) / (var_f + var_w + lively)
    return 1 - (light * shape).mean()


def log_error_loss(found: Tensor, wanted: Tensor, floor: float = 1e-5) -> Tensor:
    """Mean over pictures of the logarithm of the squared error: the PSNR itself, up to sign and scale."""
    return (found - wanted).pow(2).mean(dim=(1, 2, 3)).add(floor).log().mean()


def moment_loss(latents: Tensor) -> Tensor:
    """How far the channels of (B, C, H, W) are from mean 0 and standard deviation 1."""
    spread, centre = torch.std_mean(latents, dim=(0, 2, 3))
    return (centre.pow(2) + (spread - 1).pow(2)).mean()


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the unit Gaussian, mean over all latent values."""
    return 0.5 * (mean * mean + logvar.exp() - 1 - logvar).mean()


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture, (B,), for pictures in -1..1."""
    error = (found.float().clamp(-1, 1) - wanted.float()).pow(2).mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def draw_sigmas(
    count: int,
    *,
    weighting: str = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    shift: float = 1.0,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise levels in 0..1, (count,), in the density of the SD3 paper (arXiv 2403.03206), then shifted."""
    sigmas = compute_density_for_timestep_sampling(
        weighting,
        count,
        logit_mean=logit_mean,
        logit_std=logit_std,
        mode_scale=1.29,
        device=device,
        generator=generator,
    )
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_matching_errors(
    model: nn.Module,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    conditions: dict[str, Any],
) -> Tensor:
    """Mean squared velocity error of each picture.

    ``x_t = (1 - sigma) x_0 + sigma noise``, the model predicts ``noise - x_0`` at ``timestep = 1000 sigma``.

    Args:
        model: denoiser.
        latents: (B, C, H, W) float32, normalised.
        noise: (B, C, H, W) float32.
        sigmas: (B,) float32 in 0..1.
        conditions: encoder_hidden_states and so on, as the model's keyword arguments.

    Returns:
        (B,) float32.
    """
    level = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = model(noisy, timestep=sigmas * 1000, return_dict=False, **conditions)[0]
    return (velocity.float() - (noise - latents)).pow(2).mean(dim=(1, 2, 3))
