"""What the denoiser is asked, and how errors are weighted."""

import pytest
import torch
from diffusers import DDPMScheduler

from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.objective import FlowMatching, NoisePrediction, make_objective


def config(**changes):
    return DenoiserConfig(output_dir="x", max_train_steps=1, pretrained="x", **changes)


def draws():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    return latents, noise, torch.tensor([0.02, 0.3, 0.7, 0.98])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_prediction_is_that_of_the_scheduler(kind):
    latents, noise, levels = draws()
    scheduler = DDPMScheduler(beta_schedule="linear", prediction_type=kind)
    objective = make_objective(config(prediction=kind), 8, dict(scheduler.config))
    question = objective.question(latents, noise, levels)
    steps = (levels * 1000).long()
    assert torch.equal(question.timestep, steps)
    torch.testing.assert_close(question.noisy, scheduler.add_noise(latents, noise, steps))
    wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, steps)
    torch.testing.assert_close(question.target, wanted)
    kept = scheduler.alphas_cumprod[steps]
    snr = kept / (1 - kept)
    least = torch.minimum(snr, torch.tensor(5.0))
    weight = least / snr if kind == "epsilon" else least / (snr + 1)
    torch.testing.assert_close(question.weight, weight)
    wide = torch.cat([question.target + 1, torch.full_like(question.target, 9.0)], dim=1)
    torch.testing.assert_close(question.errors(wide), question.weight)  # a learned variance is left out
    plain = NoisePrediction(config(prediction=kind, min_snr_gamma=None))
    assert plain.question(latents, noise, levels).weight.tolist() == [1.0] * 4


def test_larger_pictures_are_noised_more():
    objective = FlowMatching(config(shift_base_resolution=256, train_shift=1.5), vae_scale=8)
    assert objective.shift(32, 32) == pytest.approx(1.5)
    assert objective.shift(128, 128) == pytest.approx(6.0)
    assert objective.shift(64, 16) == pytest.approx(1.5)
    generator = torch.Generator().manual_seed(0)
    small, large = (objective.draw(torch.zeros(4000, 1, side, side), generator).mean() for side in (32, 128))
    assert float(large) > float(small) + 0.15


def test_flow_question_runs_from_picture_to_noise():
    latents, noise, _ = draws()
    objective = make_objective(config(), 8)
    ends = objective.question(latents, noise, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(ends.noisy[0], latents[0])
    assert torch.equal(ends.noisy[1], noise[1])
    assert torch.equal(ends.target, noise - latents)
    assert ends.timestep.tolist() == [0.0, 1000.0, 0.0, 1000.0]
