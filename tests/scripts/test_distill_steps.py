"""Few-step distillation, end to end with tiny models."""

import json
import shutil

import numpy as np
import pytest
import tiny_models
import tiny_training
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from training_forks import script

from gspn2_diffusion.pipelines.model_folders import WEIGHT_NAME
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.few_step_config import FewStepConfig
from gspn2_diffusion.training.few_steps import GuidedTeacher, ask, step_levels, walk
from gspn2_diffusion.training.rings import TensorRing


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    tiny_training.write_emoji(folder / "emoji")
    tiny_training.write_prompts(folder / "prompts.json")
    tiny_models.build_tiny_pipeline(num_layers=1).save_pretrained(folder / "teacher")
    return folder


def train(root, output, **changes):
    settings = {
        "output_dir": output,
        "data": root / "emoji",
        "pretrained": root / "teacher",
        "sprite_size": 32,
        "resolution": 16,
        "batch_size": 4,
        "refresh": 2,
        "bank_size": 12,
        "student_steps": 2,
        "teacher_steps": 4,
        "pair_bank": 4,
        "validation_scenes": 4,
        "max_text_tokens": tiny_models.MAX_TOKENS,
        "mixed_precision": "no",
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "max_train_steps": 4,
        "log_steps": 2,
        "prefetch": 2,
        "sheet_prompts": root / "prompts.json",
        "trackers": "none",
        "checkpoint_steps": 2,
        "keep_checkpoints": 3,
    }
    script("distill_steps").main(tiny_training.options({**settings, **changes}))
    return output


def measures(output, name):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def conditions(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = tiny_models.TEXT_CHANNELS
    return {
        "encoder_hidden_states": torch.randn(rows, 5, width, generator=generator),
        "encoder_attention_mask": torch.ones(rows, 5, dtype=torch.bool),
        "pooled_projections": torch.randn(rows, width, generator=generator),
    }


@pytest.mark.parametrize(("steps", "shift"), [(4, 1.0), (20, 3.0), (1, 2.0)])
def test_levels_are_those_of_the_pipelines_scheduler(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    assert step_levels(steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    coarse = step_levels(4, shift)
    assert step_levels(20, shift)[::5] == pytest.approx(coarse)


def test_path_is_guided_euler_and_keeps_every_stretch():
    model = tiny_models.tiny_transformer()
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    words, empty = conditions(), conditions(seed=5)
    levels = step_levels(4, 1.0)
    states = GuidedTeacher(model, 3.0).path(noise, words, empty, levels, every=2)
    assert len(states) == 3
    assert torch.equal(states[0], noise)
    latents = noise
    with torch.no_grad():
        for index in range(4):
            with_text, without = (ask(model, latents, levels[index], c) for c in (words, empty))
            latents = latents - 0.25 * (without + 3.0 * (with_text - without))
            if index == 1:
                torch.testing.assert_close(states[1], latents)
        torch.testing.assert_close(states[2], latents)
        unguided = GuidedTeacher(model, 1.0).path(noise, words, empty, levels, every=4)[-1]
        torch.testing.assert_close(unguided, walk(model, noise, words, levels))


def test_ring_replaces_the_oldest_and_draws_whole_rows():
    ring = TensorRing(4, {"a": torch.zeros(2, 3), "b": torch.zeros(2)}, {"a": torch.float64})
    for number in range(3):
        values = torch.full((2,), float(number))
        ring.write(2 * number, {"a": values[:, None].expand(2, 3), "b": values})
    drawn = ring.draw(64, torch.Generator().manual_seed(0))
    assert drawn["a"].dtype == torch.float64
    assert set(drawn["b"].tolist()) == {1.0, 2.0}
    assert torch.equal(drawn["a"][:, 0].float(), drawn["b"])


def test_student_learns_the_guided_path_and_its_folder_draws_by_itself(root, tmp_path):
    """A few captions and noises alone: the student must come close to the teacher on them."""
    output = train(
        root,
        tmp_path / "run",
        max_train_steps=90,
        batch_size=32,
        refresh=16,
        pair_bank=512,
        learning_rate=1e-2,
        between_share=0.0,
        teacher_guidance=2.0,
        ema_decay=0.9,
        log_steps=10,
        checkpoint_steps=1000,
        final_checkpoint=False,
    )
    losses = measures(output, "loss")
    assert losses[-1] < 0.3 * losses[0]
    assert measures(output, "val_train")[-1] < 0.2 * measures(output, "val_train")[0]
    assert measures(output, "gap_closed_train")[-1] > 0.5
    pipeline = GSPN2Pipeline.from_pretrained(output / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.config["default_steps"], pipeline.config["default_guidance_scale"]) == (2, 1.0)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    drawn = pipeline("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt").images
    assert calls == [1, 1]  # two steps, one row each: no guidance
    named = pipeline(
        "a red apple",
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images
    assert torch.equal(drawn, named)
    assert (output / "pipeline" / "README.md").is_file()


def test_interrupted_run_ends_with_the_same_weights(root, tmp_path):
    full = train(root, tmp_path / "full")
    output = tmp_path / "resumed"
    output.mkdir()
    shutil.copytree(full / "checkpoint-2", output / "checkpoint-2")
    train(root, output, resume_from="latest")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other, early = (
            load_file(path / name)
            for path in (full / "checkpoint-4", output / "checkpoint-4", full / "checkpoint-2")
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name
        assert not all(torch.equal(one[key], early[key]) for key in one), name


def test_adapter_alone_is_trained_resumed_and_put_into_the_model_folder(root, tmp_path):
    """Two steps and two after a resume: bit for bit four in one go; only the adapter is ever written."""
    pytest.importorskip("peft")
    changes = {"lora_rank": 3, "learning_rate": 2e-2, "ema_decay": 0.5, "save_compact": tmp_path / "compact"}
    full = train(root, tmp_path / "full", **changes)
    output = tmp_path / "resumed"
    output.mkdir()
    shutil.copytree(full / "checkpoint-2", output / "checkpoint-2")
    train(root, output, resume_from="latest", **changes)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (load_file(path / "checkpoint-4" / name) for path in (full, output))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    held = load_file(full / "checkpoint-4" / "model.safetensors")
    carried = load_file(next((tmp_path / "compact").glob("weights-*.safetensors")))
    assert all("lora_" in key for key in [*held, *carried])
    assert "gap_closed_train" in (full / "metrics.jsonl").read_text()

    adapter = load_file(full / "lora" / WEIGHT_NAME)
    linear = [
        m for m in tiny_models.tiny_transformer(num_layers=1).modules() if isinstance(m, torch.nn.Linear)
    ]
    assert len(adapter) == 2 * len(linear)
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    ups = [value for key, value in adapter.items() if "lora_B" in key]
    assert any(value.any() for value in ups)
    before = load_file(root / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors")
    after = load_file(full / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(before[key].bfloat16(), after[key]) for key in before
    )  # the weights themselves stayed

    pipeline = GSPN2Pipeline.from_pretrained(full / "pipeline")
    config = pipeline.config
    assert (config["few_steps"], config["few_steps_guidance_scale"], config["default_steps"]) == (
        2,
        1.0,
        None,
    )
    plain = GSPN2Pipeline.from_pretrained(full / "pipeline")
    plain.load_lora_weights(full / "lora")
    pipeline.enable_few_steps()
    expected = draw(plain, num_inference_steps=2, guidance_scale=1.0)
    torch.testing.assert_close(draw(pipeline), expected, atol=1e-3, rtol=0)
    card = (full / "lora" / "README.md").read_text()
    assert "num_inference_steps=2, guidance_scale=1" in card
    with pytest.raises(SystemExit, match="it differs in: lora_rank"):
        train(root, tmp_path / "other", resume_from=full / "checkpoint-4", **{**changes, "lora_rank": 2})


def draw(pipeline, **settings):
    generator = torch.Generator().manual_seed(3)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a red apple", generator=generator, output_type="pt", **settings).images


def test_assembled_folder_has_the_adapter_and_its_size_counts(root, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipeline = tiny_models.build_tiny_pipeline(num_layers=1)
    pipeline.transformer.add_adapter(LoraConfig(r=64, target_modules=["to_scan"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "lora")
    names = ("vae", "transformer", "text_encoder", "tokenizer")
    parts = {name: root / "teacher" / name for name in names}
    settings = parts | {"out": tmp_path / "model", "few_steps": tmp_path / "lora", "few_steps_count": 3}
    script("assemble_pipeline").main(tiny_training.options(settings))
    assert (tmp_path / "model" / "few_steps" / WEIGHT_NAME).is_file()
    built = GSPN2Pipeline.from_pretrained(tmp_path / "model")
    assert (built.config["few_steps"], built.config["few_steps_guidance_scale"]) == (3, 1.0)
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file()) / 1e6
    with pytest.raises(SystemExit, match="assemble_pipeline: the pipeline takes"):
        script("assemble_pipeline").main(
            tiny_training.options(settings | {"out": tmp_path / "again", "limit_mb": size - 0.005})
        )
    with pytest.raises(SystemExit, match=r"few-step adapter .* is missing"):
        script("assemble_pipeline").main(tiny_training.options(settings | {"few_steps": tmp_path}))


def test_wrong_settings_end_with_one_line(root, tmp_path):
    def config(**changes):
        FewStepConfig(output_dir="x", max_train_steps=1, pretrained="gspn2-emoji", **changes).validate()

    with pytest.raises(ConfigError, match="`teacher_steps` is 10; allowed: multiples of `student_steps`, 4"):
        config(teacher_steps=10)
    with pytest.raises(ConfigError, match=r"`optimizer` is 'muon'.* allowed with `lora_rank`: adamw"):
        config(lora_rank=4, optimizer="muon")
    with pytest.raises(ConfigError, match="`lora_rank` is -1"):
        config(lora_rank=-1)
    with pytest.raises(ConfigError, match="`lora_alpha` is 4; it is for a `lora_rank`"):
        config(lora_alpha=4)
    with pytest.raises(ConfigError, match="`aspects` is set"):
        config(aspects=["192x320"])
    with pytest.raises(ConfigError, match="`refresh` is 500"):
        config(refresh=500)
    with pytest.raises(SystemExit, match="distill_steps: `teacher`: there is no model in"):
        train(root, tmp_path / "run", teacher=tmp_path)
