"""Distillation, end to end with tiny models."""

import json

import pytest
import tiny_models
import tiny_pictures
import tiny_training
import torch
from safetensors.torch import load_file
from torch import nn
from training_forks import script

from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.training.alignment import Adapter, BlockAlignment, EndToEnd
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.distill import Gap
from gspn2_diffusion.training.distill_config import DistillConfig
from gspn2_diffusion.training.objective import Question
from gspn2_diffusion.training.students import find_sites, make_student


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, and an attention model that has learnt them to some degree.

    It begins with random gates, not with closed ones, so that it leans on its attention: else the loss hardly
    tells it from its student before training, and chance which of them is better.
    """
    folder = tmp_path_factory.mktemp("distil")
    tiny_pictures.write_folder(folder / "data", count=8, size=(16, 16))
    tiny_training.write_models(folder / "models")
    shape = json.loads((folder / "models" / "transformer.json").read_text())
    (folder / "softmax.json").write_text(json.dumps(shape | {"mixer": "softmax", "num_layers": 2}))
    tiny_models.tiny_transformer(mixer="softmax", num_layers=2).save_pretrained(folder / "start")
    changes = {
        "data": folder / "data",
        "cache_dir": folder / "cache",
        "transformer_config": folder / "softmax.json",
        "init_from": folder / "start",
        "sheet_prompts": "none",
        "trackers": "none",
        "learning_rate": 1e-2,
        "batch_size": 8,
        "ema_decay": 0.9,
        "max_train_steps": 60,
        "log_steps": 30,
        "final_checkpoint": False,
    }
    script("train_text_to_image").main(tiny_training.denoiser_options(folder, folder / "run", **changes))
    (folder / "run" / "pipeline").rename(folder / "teacher")
    return folder


def train(root, output, **changes):
    settings = {
        "output_dir": output,
        "data": root / "data",
        "cache_dir": root / "cache",
        "pretrained": root / "teacher",
        "resolution": 16,
        "batch_size": 8,
        "proxy_ratio": 2,
        "learning_rate": 5e-3,
        "stage1_learning_rate": 2e-2,
        "stage1_steps": 4,
        "max_train_steps": 4,
        "max_text_tokens": tiny_models.MAX_TOKENS,
        "mixed_precision": "no",
        "warmup_steps": 1,
        "ema_decay": 0.5,
        "sheet_steps": 2,
        "sheet_prompts": "none",
        "prefetch": 2,
        "adapter_rank": 4,
        "checkpoint_steps": 2,
        "keep_checkpoints": 3,
        "trackers": "none",
    }
    script("distill").main(tiny_training.options({**settings, **changes}))
    return output


def measures(output, name):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def config(**changes):
    return DistillConfig(output_dir="x", max_train_steps=1, stage1_steps=1, **changes)


def question(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    conditions = {
        "encoder_hidden_states": torch.randn(2, 5, tiny_models.TEXT_CHANNELS, generator=generator),
        "pooled_projections": torch.randn(2, tiny_models.TEXT_CHANNELS, generator=generator),
    }
    asked = Question((latents + noise) / 2, torch.tensor([500.0, 300.0]), noise - latents, torch.ones(2))
    return asked, conditions


def test_student_is_the_teacher_but_for_its_mixers():
    teacher = tiny_models.tiny_transformer(mixer="softmax", num_layers=4)
    student = make_student(teacher, config(keep_attention=["1"], proxy_ratio=4))
    assert student.config.mixer == ["gspn2", "gspn2", "softmax", "gspn2"]
    assert [site.name for site in find_sites(teacher, student)] == [
        f"transformer_blocks.{n}.mixer" for n in (0, 1, 3)
    ]
    for name, value in student.state_dict().items():
        if ".mixer." not in name or name.startswith("transformer_blocks.2."):
            assert torch.equal(value, teacher.state_dict()[name]), name
    assert student.transformer_blocks[0].mixer.proxy_dim == 4
    named = make_student(teacher, config(keep_attention=["0", "3"]))
    assert named.config.mixer == ["softmax", "gspn2", "gspn2", "softmax"]
    with pytest.raises(ConfigError, match=r"`keep_attention` is \[7, 9\]"):
        make_student(teacher, config(keep_attention=["7", "9"]))
    with pytest.raises(ConfigError, match="no attention"):
        make_student(tiny_models.tiny_transformer(), config())


def test_stage_one_shows_every_mixer_the_teachers_inputs():
    """Each block's gradient is what it is when that block alone is compared on the teacher's tokens."""
    teacher = tiny_models.tiny_transformer(mixer="softmax", num_layers=2).requires_grad_(False)
    student = make_student(teacher, config(proxy_ratio=2))
    seen = {}
    for n, block in enumerate(teacher.transformer_blocks):
        block.mixer.register_forward_hook(lambda m, a, o, n=n: seen.update({n: (a, o)}))
    asked, conditions = question()
    asked.ask(teacher, conditions)
    sites = find_sites(teacher, student)
    module = BlockAlignment(student, teacher, sites)
    loss = module(asked, conditions)
    loss.backward()
    expected = 0.0
    for n, site in enumerate(sites):
        mixer = GSPN2Mixer(site.width, student.config.proxy_dim)
        mixer.load_state_dict(student.get_submodule(site.name).state_dict())
        arguments, wanted = seen[n]
        error = (mixer(*arguments) - wanted).pow(2).mean() / wanted.pow(2).mean()
        (error / len(sites)).backward()
        expected += error / len(sites)
        found = student.get_submodule(site.name).to_out.weight.grad
        torch.testing.assert_close(found, mixer.to_out.weight.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss, expected)
    assert student.proj_out.weight.grad is None


def test_stage_two_is_zero_for_a_student_that_is_the_teacher():
    teacher = tiny_models.tiny_transformer(mixer="softmax")
    student = make_student(teacher, config())
    sites = find_sites(teacher, student)
    same = tiny_models.tiny_transformer(mixer="softmax")
    asked, conditions = question()
    module = EndToEnd(same, teacher, sites, (0.0, 1.0, 1.0, 1.0), rank=4)
    assert module(asked, conditions).item() == pytest.approx(0, abs=1e-6)
    names = {type(child).__name__ for child in module.adapters.values()}
    assert names == {"Adapter"}
    assert len(module.adapters) == 2 * len(sites)
    other = EndToEnd(student, teacher, sites, (0.0, 0.0, 1.0, 1.0), rank=4)
    loss = other(asked, conditions)
    loss.backward()
    assert loss.item() > 0.01
    assert all(a.up.weight.grad.abs().sum() > 0 for a in other.adapters.values())
    assert not any("_teacher" in name for name, _ in other.named_parameters())


def test_adapter_starts_as_the_identity():
    adapter = Adapter(12, 4)
    x = torch.randn(2, 3, 12)
    assert torch.equal(adapter(x), x)
    assert sum(p.numel() for p in adapter.parameters()) < 12 * 12


@pytest.fixture(scope="module")
def whole(root):
    return train(root, root / "whole", stage1_steps=40, max_train_steps=20, init="random", learning_rate=1e-3)


def test_both_stages_close_the_gap_and_write_a_pipeline(root, whole):
    aligned = measures(whole / "stage-1", "gap_closed_train")
    # The same weights are measured twice; 1e-4 of the gap is far above rounding, far below any progress.
    assert aligned[0] == pytest.approx(0, abs=1e-4)
    assert aligned[-1] > 0.2
    final = measures(whole, "gap_closed_train")
    assert final[0] == pytest.approx(aligned[-1], abs=1e-4)
    assert final[-1] > 0.5
    pipeline = GSPN2Pipeline.from_pretrained(whole / "pipeline")
    assert pipeline.transformer.config.mixer == ["gspn2"] * 2
    assert not any("adapter" in name for name, _ in pipeline.transformer.named_parameters())
    assert pipeline("a red apple", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)
    assert isinstance(pipeline.transformer.transformer_blocks[0].mixer, nn.Module)


@pytest.mark.parametrize("stage", [1, 2])
def test_interrupted_distillation_ends_with_the_same_weights(root, stage, tmp_path):
    """The first stage's checkpoint, or the second's, is all that is left of the interrupted run."""
    import shutil

    full = root / "full"
    if not full.exists():
        train(root, full)
    output = tmp_path / "half"
    output.mkdir()
    shutil.copy(full / "gap.json", output)
    if stage == 1:
        shutil.copytree(full / "stage-1" / "checkpoint-2", output / "stage-1" / "checkpoint-2")
    else:
        shutil.copytree(full / "stage-1", output / "stage-1")
        shutil.copytree(full / "checkpoint-2", output / "checkpoint-2")
    train(root, output, resume_from="latest")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-4" / name) for folder in (full, output))
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_gap_counts_from_the_untrained_student_to_the_teacher(tmp_path):
    Gap(tmp_path / "gap.json").set({"val_a": 0.2, "val_b": 0.5}, {"val_a": 1.0, "val_b": 0.4})
    known = Gap(tmp_path / "gap.json")
    assert known.is_known
    assert known.closed({"val_a": 0.36, "val_b": 0.45}) == {"gap_closed_a": pytest.approx(0.8)}


def test_wrong_settings_end_with_one_line(root, tmp_path):
    with pytest.raises(SystemExit, match="max_train_steps"):
        train(root, tmp_path / "run", stage1_steps=-1, max_train_steps=-1)
    with pytest.raises(SystemExit, match="there is no model"):
        train(root, tmp_path / "run", teacher=tmp_path)
