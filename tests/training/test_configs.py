"""The ready settings are valid and describe models of the size that they claim."""

from pathlib import Path

import pytest
import torch
import yaml

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.training.config import AutoencoderConfig, DenoiserConfig, parse_config, read_mapping
from gspn2_diffusion.training.distill_config import DistillConfig
from gspn2_diffusion.training.lora_config import LoraTrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {
    "autoencoder": AutoencoderConfig,
    "lora": LoraTrainConfig,
    "dreambooth": LoraTrainConfig,
    "distill": DistillConfig,
}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_settings_are_valid(file):
    kind = KINDS.get(file.stem, DenoiserConfig)
    options = ["--config", str(file), "--output_dir", "x", "--max_train_steps", "10"]
    if kind is not AutoencoderConfig and "pretrained" not in read_mapping(file):
        options += ["--pretrained", "gspn2-emoji"]
    if file.stem == "dreambooth":
        options += ["--class_data", "dogs", "--class_prompt", "a dog"]
    assert parse_config(kind, options).max_train_steps == 10


@pytest.mark.parametrize(("name", "size"), [("0.6b", 0.6e9), ("1.6b", 1.6e9)])
def test_large_models_have_their_size(name, size):
    with torch.device("meta"):
        model = GSPN2Transformer2DModel.from_config(read_mapping(CONFIGS / f"gspn2-{name}-transformer.json"))
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(file))
    assert found.num_processes >= 2
    assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"
