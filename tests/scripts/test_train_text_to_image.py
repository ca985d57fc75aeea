"""The denoiser's script, end to end with tiny models."""

import json

import pytest
import tiny_models
import tiny_training
import torch
from PIL import Image
from safetensors.torch import load_file
from script_modules import load_script


def script(name):
    return load_script(f"scripts/{name}.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    tiny_training.write_emoji(folder / "emoji")
    tiny_training.write_models(folder / "models")
    tiny_training.write_prompts(folder / "prompts.json")
    return folder


def train(root, output, **changes):
    script("train_text_to_image").main(tiny_training.denoiser_options(root, output, **changes))
    return output


@pytest.fixture(scope="module")
def whole(root):
    """Four steps with Muon, a checkpoint at two, sheets and compact files."""
    return train(
        root,
        root / "whole",
        optimizer="muon",
        checkpoint_steps=2,
        keep_checkpoints=3,
        sample_steps=2,
        save_compact=root / "compact",
        lr_decay_fraction=0.5,
    )


def same(first, second):
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_run_writes_a_pipeline_that_draws(root, whole):
    pipeline_class = type(tiny_models.build_tiny_pipeline())
    pipeline = pipeline_class.from_pretrained(whole / "pipeline")
    picture = pipeline("a red apple", num_inference_steps=2, height=16, width=16).images[0]
    assert picture.size == (16, 16)
    saved = load_file(whole / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    average = load_file(whole / "checkpoint-4" / "ema.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[key], average[key].bfloat16()) for key in average)
    steps = {path.name for path in (whole / "sheets").iterdir()}
    assert steps == {f"step-000000{step}.png" for step in (0, 2, 4)}
    assert Image.open(whole / "sheets" / "step-0000004.png").width > 300
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1].keys() >= {"val_train", "val_unseen_pair"}
    assert json.loads((whole / "config.json").read_text())["optimizer"] == "muon"


def test_interrupted_run_ends_with_the_same_weights(root, whole):
    """Two steps, a new process' worth of state, two more: bitwise what four steps give."""
    half = root / "half"
    train(
        root,
        half,
        optimizer="muon",
        lr_decay_fraction=0.5,
        max_train_steps=4,
        resume_from=whole / "checkpoint-2",
        save_pipeline=False,
    )
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert same(whole / "checkpoint-4" / name, half / "checkpoint-4" / name), name
    assert not same(whole / "checkpoint-2" / "model.safetensors", half / "checkpoint-4" / "model.safetensors")


def test_compact_files_carry_a_run(root, whole):
    output = train(
        root, root / "carried", resume_from=root / "compact", max_train_steps=6, save_pipeline=False
    )
    state = json.loads((output / "checkpoint-6" / "state.json").read_text())
    assert (state["step"], state["warm_from"], state["pictures"]) == (6, 4, 24)


def test_resume_from_another_architecture_is_refused(root, whole):
    config = json.loads((root / "models" / "transformer.json").read_text())
    other = root / "other.json"
    other.write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(SystemExit, match=r"another architecture.*num_layers"):
        train(root, root / "refused", transformer_config=other, resume_from=whole / "checkpoint-4")


def test_non_finite_gradient_stops_the_run_and_keeps_checkpoints_clean(root):
    from gspn2_diffusion.training.loop import TrainingDivergedError

    output = root / "diverged"
    changes = {"learning_rate": 1e30, "warmup_steps": 1, "max_train_steps": 30, "checkpoint_steps": 1}
    with pytest.raises(TrainingDivergedError, match="not finite"):
        train(root, output, **changes)
    assert not (output / "pipeline").exists()
    for path in output.glob("checkpoint-*/model.safetensors"):
        assert all(bool(torch.isfinite(t).all()) for t in load_file(path).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [({"num_layer": 3}, "did you mean `num_layers`"), ({"num_layers": 0}, "num_layers must be a positive")],
)
def test_wrong_architectures_end_with_one_line(root, change, words):
    config = json.loads((root / "models" / "transformer.json").read_text())
    (root / "wrong.json").write_text(json.dumps(config | change))
    with pytest.raises(SystemExit, match=words):
        train(root, root / "none", transformer_config=root / "wrong.json")


def test_denoiser_must_fit_the_frozen_models(root):
    config = json.loads((root / "models" / "transformer.json").read_text())
    (root / "wide.json").write_text(json.dumps(config | {"in_channels": 8, "out_channels": 8}))
    with pytest.raises(SystemExit, match="`vae` gives 4 channels; the denoiser's in_channels is 8"):
        train(root, root / "none", transformer_config=root / "wide.json")


def test_missing_models_end_with_one_line(root):
    options = tiny_training.denoiser_options(root, root / "none", pretrained=root / "nowhere")
    with pytest.raises(SystemExit, match="nowhere"):
        script("train_text_to_image").main(options)


def test_parts_are_assembled_and_drawn_on_a_sheet(root, whole):
    parts = {name: root / "models" / name for name in ("vae", "text_encoder", "tokenizer")}
    parts |= {"transformer": whole / "transformer", "out": root / "assembled"}
    options = tiny_training.options({**parts, "shift": 2.0, "max_text_tokens": tiny_models.MAX_TOKENS})
    with pytest.raises(SystemExit, match="allowed: 0"):
        script("assemble_pipeline").main([*options, "--limit_mb", "0.01"])
    assert not (root / "assembled").exists()
    (root / "assembled").mkdir()
    (root / "assembled" / "README.md").write_text("card")
    script("assemble_pipeline").main(options)
    assert (root / "assembled" / "README.md").read_text() == "card"
    scheduler = json.loads((root / "assembled" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 2.0
    script("sample_sheet").main(
        tiny_training.options(
            {
                "model": root / "assembled",
                "prompts": root / "prompts.json",
                "out": root / "sheet.png",
                "pictures": root / "pictures",
                "size": 16,
                "steps": 2,
            }
        )
    )
    assert Image.open(root / "sheet.png").height > 150
    assert len(list((root / "pictures").glob("*.png"))) == 2
