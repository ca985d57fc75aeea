"""The ready settings are valid and describe models of the size that they claim."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_forks import script

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.training.config import (
    AutoencoderConfig,
    ConfigError,
    DenoiserConfig,
    parse_config,
    read_mapping,
)
from gspn2_diffusion.training.distill_config import DistillConfig
from gspn2_diffusion.training.few_step_config import FewStepConfig
from gspn2_diffusion.training.lora_config import LoraTrainConfig
from gspn2_diffusion.training.runtime import check_launch, flag
from gspn2_diffusion.training.zero import wanted_stage

CONFIGS = Path(__file__).parents[2] / "configs"
train_text_to_image = script("train_text_to_image")
KINDS = {
    "autoencoder": AutoencoderConfig,
    "lora": LoraTrainConfig,
    "dreambooth": LoraTrainConfig,
    "distill": DistillConfig,
    "few-steps": FewStepConfig,
    "few-steps-lora": FewStepConfig,
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


def test_numbers_can_be_unset_on_the_command_line():
    """The configuration has a number; scripts/compare_mixers.py takes it away."""
    options = [
        "--config",
        str(CONFIGS / "text-to-image.yaml"),
        "--output_dir",
        "x",
        "--max_train_steps",
        "10",
    ]
    options += ["--pretrained", "gspn2-emoji"]
    assert parse_config(DenoiserConfig, options).validate_minutes == 1.0
    changed = parse_config(DenoiserConfig, [*options, "--validate_minutes", "none", "--validate_steps", "5"])
    assert (changed.validate_minutes, changed.validate_steps) == (None, 5)
    with pytest.raises(SystemExit):
        parse_config(DenoiserConfig, [*options, "--validate_minutes", "often"])


@pytest.mark.parametrize(("name", "size"), [("0.6b", 0.6e9), ("1.6b", 1.6e9)])
def test_large_models_have_their_size(name, size):
    with torch.device("meta"):
        model = GSPN2Transformer2DModel.from_config(read_mapping(CONFIGS / f"gspn2-{name}-transformer.json"))
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_launches_its_files(file, monkeypatch):
    """What `accelerate launch` would hand to the script, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    # Nothing is started here, so it does not matter who has the port.
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port=None: False)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments = _validate_launch_command(arguments)[0]
    assert (arguments.num_machines, arguments.num_processes) == ((2, 16) if "multi" in file.stem else (1, 2))
    deepspeed = file.stem == "deepspeed"
    if deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` does this in between
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    missing = deepspeed and find_spec("deepspeed") is None
    with pytest.raises(ConfigError, match=r"not installed.*fsdp2-zero2\.yaml") if missing else nullcontext():
        check_launch()
    assert wanted_stage(SimpleNamespace(state=None)) == (2 if deepspeed else None)
    split = "fsdp2" in file.stem
    assert flag("ACCELERATE_USE_FSDP") == split
    assert flag("FSDP_RESHARD_AFTER_FORWARD") == (split and "zero2" not in file.stem)
    assert not flag("FSDP_CPU_RAM_EFFICIENT_LOADING")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "version 1.*fsdp_version: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM is set"),
    ],
)
def test_other_ways_to_split_a_model_are_refused(environment, words, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=words):
        train_text_to_image.main(
            ["--output_dir", str(tmp_path), "--max_train_steps", "1", "--pretrained", "gspn2-emoji"]
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": 3}, "stage is 3; allowed: 1, 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "`offload_optimizer` is on 'cpu'"),
    ],
)
def test_what_deepspeed_is_not_used_for_names_fsdp2(settings, words, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": settings})
    with pytest.raises(ConfigError, match=rf"{words}.*fsdp2\.yaml"):
        wanted_stage(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
