"""The denoiser's script on the user's own pictures."""

import json

import pytest
import tiny_models
import tiny_pictures
import tiny_training
import torch
from safetensors.torch import load_file
from training_forks import script

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny_training.write_models(folder / "models")
    data = tiny_pictures.write_folder(folder / "data", count=24)
    tiny_pictures.write_damaged(data)
    with (data / "metadata.jsonl").open("a") as stream:
        for name in ("empty.png", "short.png", "text.png", "bomb.png"):
            stream.write(json.dumps({"file_name": name, "text": ["a red apple"]}) + "\n")
    return folder


def train(root, output, **changes):
    settings = {
        "data": root / "data",
        "cache_dir": root / "cache",
        "sheet_prompts": "none",
        "max_train_steps": 5,
        "gradient_accumulation_steps": 2,
        "batch_size": 3,
        "trackers": "none",
    }
    script("train_text_to_image").main(
        tiny_training.denoiser_options(root, output, **{**settings, **changes})
    )
    return output


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    return train(root, root / "whole", checkpoint_steps=2, keep_checkpoints=3, trackers="tensorboard")


def test_run_on_a_folder_lists_damage_and_writes_a_pipeline(whole):
    rows = [json.loads(line) for line in (whole / "skipped.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"val_train", "val_held_out"}
    assert list((whole / "logs").glob("events.*"))
    card = (whole / "pipeline" / "README.md").read_text()
    assert "| learning_rate | 0.001 |" in card
    assert "val_held_out" in card
    pipeline = type(tiny_models.build_tiny_pipeline()).from_pretrained(whole / "pipeline")
    assert pipeline("a red apple", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)
    assert not list((whole / "sheets").glob("*.part"))


def test_interrupted_run_goes_on_at_its_place_in_the_data(root, whole):
    resumed = train(root, root / "resumed", resume_from=whole / "checkpoint-2", save_pipeline=False)
    for name in FILES:
        one, other = (load_file(folder / "checkpoint-5" / name) for folder in (whole, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_eight_pictures_are_learnt_by_heart(root, tmp_path):
    tiny_pictures.write_folder(tmp_path / "eight", count=8, size=(16, 16))
    wide = json.loads((root / "models" / "transformer.json").read_text())
    (tmp_path / "wide.json").write_text(json.dumps(wide | {"attention_head_dim": 24}))
    output = train(
        root,
        tmp_path / "run",
        data=tmp_path / "eight",
        transformer_config=tmp_path / "wide.json",
        learning_rate=1e-2,
        batch_size=8,
        gradient_accumulation_steps=1,
        max_train_steps=170,
        log_steps=100,
        ema_decay=0.95,
        caption_dropout=0.0,
        save_pipeline=False,
        final_checkpoint=False,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val_train"] for line in lines if "val_train" in line]
    assert losses[-1] < 0.1 * losses[0]


def test_bar_shows_speed_data_wait_and_memory(root, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # the bar would be cut there
    changes = {"progress_bar": "yes", "log_steps": 1, "max_train_steps": 2, "final_checkpoint": False}
    train(root, tmp_path / "run", save_pipeline=False, **changes)
    text = capsys.readouterr().err
    assert "2/2" in text
    assert "pictures/s data wait" in text
    assert "GiB" in text


def test_a_bad_batch_is_named(root, tmp_path):
    from gspn2_diffusion.training.loop import TrainingDivergedError

    changes = {"learning_rate": 1e30, "warmup_steps": 1, "max_train_steps": 30, "checkpoint_steps": 1}
    with pytest.raises(TrainingDivergedError, match=r"not finite.* \(batch: .*\.png"):
        train(root, tmp_path / "run", **changes)


def test_data_without_captions_end_with_one_line(root, tmp_path):
    bare = tiny_pictures.write_sidecars(tmp_path / "bare", count=2)
    for file in bare.glob("*.txt"):
        file.unlink()
    with pytest.raises(SystemExit, match=r"no usable picture.*no caption"):
        train(root, tmp_path / "run", data=bare)
