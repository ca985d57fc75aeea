"""Runs that are killed, stopped or out of disk, and how they go on."""

import json
import sys
from pathlib import Path

import pytest
import tiny_training
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import training_forks as forks

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restart")
    tiny_training.write_emoji(folder / "emoji")
    tiny_training.write_models(folder / "models")
    return folder


def options(root, output, **changes):
    settings = {
        "optimizer": "muon",
        "checkpoint_steps": 1,
        "keep_checkpoints": 2,
        "save_pipeline": False,
        "resume_from": "latest",
        "trackers": "none",
        "sheet_prompts": None,
    }
    return tiny_training.denoiser_options(root, output, **{**settings, **changes})


@pytest.fixture(scope="module")
def whole(root):
    """Four steps without trouble."""
    assert forks.train("train_text_to_image", options(root, root / "whole")) == 0
    return root / "whole" / "checkpoint-4"


def assert_same(first, second):
    for name in FILES:
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name


@pytest.mark.parametrize(("trouble", "value"), [("kill_in_step", 3), ("kill_in_write", 8)])
def test_killed_run_ends_with_the_same_weights(root, whole, trouble, value):
    output = root / trouble
    assert forks.train("train_text_to_image", options(root, output), trouble, value) == -9
    left = sorted(path.name for path in output.glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2"]
    assert bool(list(output.glob(".checkpoint-*.part"))) == (trouble == "kill_in_write")
    assert forks.train("train_text_to_image", options(root, output)) == 0
    assert_same(whole, output / "checkpoint-4")
    left = sorted(path.name for path in output.iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-3", "checkpoint-4"]


def test_sigterm_saves_and_leaves(root, whole):
    output = root / "terminated"
    changes = {"checkpoint_steps": 100, "final_checkpoint": False}
    code = forks.train("train_text_to_image", options(root, output, **changes), "terminate_in_step", 2)
    assert code == 143
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (output / "transformer").exists()
    assert forks.train("train_text_to_image", options(root, output)) == 0
    assert_same(whole, output / "checkpoint-4")


def test_full_disk_while_saving_keeps_what_was_saved(root, whole):
    output = root / "full"
    assert forks.train("train_text_to_image", options(root, output, max_train_steps=2)) == 0
    code = forks.train("train_text_to_image", options(root, output), "limit_files", 16)
    assert code == 1
    assert not list(output.glob(".*.part"))
    assert json.loads((output / "checkpoint-2" / "state.json").read_text())["step"] == 2
    assert forks.train("train_text_to_image", options(root, output)) == 0
    assert (output / "checkpoint-4").is_dir()
