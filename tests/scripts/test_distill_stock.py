"""Distillation of diffusers' own models, which `convert_to_gspn2` turns into students."""

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_pictures
import tiny_training
import torch
from diffusers import (
    AutoencoderDC,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusionPipeline,
)
from training_forks import script

from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.training.stock import StockModels

sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))
import tiny_denoisers


def shared(scheduler):
    return {
        "vae": tiny_models.tiny_vae(),
        "text_encoder": tiny_models.tiny_text_encoder(),
        "tokenizer": tiny_models.tiny_tokenizer(),
        "scheduler": scheduler,
    }


def pipeline(family):
    if family == "sd":
        return StableDiffusionPipeline(
            unet=tiny_denoisers.tiny_unet(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **shared(DDPMScheduler(prediction_type="v_prediction")),
        )
    if family == "pixart":
        return PixArtSigmaPipeline(transformer=tiny_denoisers.tiny_pixart(), **shared(DDPMScheduler()))
    widths = (8, 8, 8)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    parts = shared(FlowMatchEulerDiscreteScheduler()) | {"vae": vae}
    return SanaPipeline(transformer=tiny_denoisers.tiny_sana(), **parts)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_pictures.write_folder(tmp_path_factory.mktemp("stock") / "data", count=6)


@pytest.mark.parametrize(("family", "layers"), [("sd", 7), ("pixart", 3)])
def test_converted_students_learn_from_their_teachers(data, tmp_path, family, layers):
    pipeline(family).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    output = tmp_path / "run"
    settings = {
        "output_dir": output,
        "data": data,
        "pretrained": tmp_path / "teacher",
        "resolution": 32,
        "batch_size": 2,
        "proxy_ratio": 4,
        "init": "random",
        "stage1_steps": 8,
        "stage1_learning_rate": 1e-2,
        "max_train_steps": 2,
        "max_text_tokens": tiny_models.MAX_TOKENS,
        "mixed_precision": "no",
        "warmup_steps": 1,
        "ema_decay": 0.5,
        "log_steps": 1,
        "sheet_prompts": "none",
        "sheet_steps": 2,
        "adapter_rank": 2,
        "keep_attention": 1,
        "trackers": "none",
    }
    script("distill").main(tiny_training.options(settings))
    lines = [json.loads(line) for line in (output / "stage-1" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    state = json.loads((output / "checkpoint-2" / "state.json").read_text())
    assert len(state["architecture"]["gspn2_conversion"]["layers"]) == layers - 1
    loaded = DiffusionPipeline.from_pretrained(output / "pipeline")
    denoiser = loaded.components.get("unet") or loaded.components.get("transformer")
    assert sum(isinstance(module, GSPN2Mixer) for module in denoiser.modules()) == layers - 1
    assert "DiffusionPipeline.from_pretrained" in (output / "pipeline" / "README.md").read_text()
    if family == "sd":  # PixArt's pipeline draws at its own sizes alone
        assert (output / "sheets" / "step-0000002.png").is_file()


def test_conditions_are_those_of_the_family():
    made = pipeline("sana")
    stock = StockModels(made, made.transformer, tiny_models.MAX_TOKENS)
    text = stock.texts(["a red apple", "a rocket on a blue background"])
    assert stock.prediction == "flow"
    latents = torch.randn(2, 4, 8, 8)
    out = made.transformer(latents, timestep=torch.ones(2), **stock.conditions(text, latents))
    assert out.sample.shape == latents.shape
    xl = tiny_denoisers.tiny_unet_xl()
    made = pipeline("sd")
    stock = StockModels(made, xl, 12)
    assert stock.family == "sdxl"
    assert stock.multiple == 2 * 2
    text = text.__class__(text.hidden, text.mask, torch.randn(2, tiny_denoisers.TEXT))
    conditions = stock.conditions(text, latents)
    assert conditions["added_cond_kwargs"]["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]
    assert xl(latents, timestep=torch.ones(2), **conditions).sample.shape == latents.shape
