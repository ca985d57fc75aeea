"""The autoencoder's script, end to end with a tiny model."""

import json
from pathlib import Path

import pytest
import tiny_training
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from script_modules import load_script

from gspn2_diffusion.training.config import read_mapping

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder")
    tiny_training.write_emoji(folder / "emoji")
    tiny_training.write_models(folder / "models")
    return folder


def train(root, output, **changes):
    module = load_script("scripts/train_autoencoder.py")
    module.main(tiny_training.autoencoder_options(root, output, **changes))
    return output


@pytest.fixture(scope="module")
def output(root):
    """A whole run; a fixture, as the tests that look at it may be given to different processes."""
    return train(root, root / "run", checkpoint_steps=6, keep_checkpoints=3)


def test_training_improves_and_saves_latent_statistics(root, output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    ratio = [line["psnr"] for line in lines if "psnr" in line]
    assert ratio[-1] > ratio[0] + 1
    vae = AutoencoderKL.from_pretrained(output / "vae")
    saved = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert vae.config.scaling_factor != 0.5
    assert vae.config.shift_factor != 0.25
    assert len(list((output / "sheets").glob("*.png"))) == 1
    again = train(root, root / "again", resume_from=output / "checkpoint-6")
    one, other = (AutoencoderKL.from_pretrained(folder / "vae").state_dict() for folder in (output, again))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_statistics_normalise_latents(root, output):
    from gspn2_diffusion.training.config import AutoencoderConfig
    from gspn2_diffusion.training.data import split_records
    from gspn2_diffusion.training.emoji import load_sprites
    from gspn2_diffusion.training.scene_clutter import clutter
    from gspn2_diffusion.training.scenes import compose

    vae = AutoencoderKL.from_pretrained(output / "vae", dtype=torch.float32)
    records = split_records(AutoencoderConfig(data=str(root / "emoji")), "train", ("all",))
    pixels = compose(load_sprites(records, size=32), clutter(64, len(records), 3, (9,), single=0.85), 16)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(latents.mean())) < 0.15
    assert float(latents.std()) == pytest.approx(1.0, abs=0.15)


def test_embedded_configuration_is_small():
    vae = AutoencoderKL.from_config(read_mapping(ROOT / "configs" / "gspn2-emoji-vae.json"))
    assert sum(param.numel() for param in vae.parameters()) <= 2_900_000
    assert vae.config.latent_channels == 8
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode().shape == (1, 8, 8, 8)
