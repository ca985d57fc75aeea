"""The adapter's script, end to end with tiny models."""

import json

import pytest
import tiny_models
import tiny_pictures
import tiny_training
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from training_forks import script

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    tiny_models.build_tiny_pipeline().save_pretrained(folder / "base")
    tiny_pictures.write_sidecars(folder / "data", count=6)
    return folder


def train(root, output, **changes):
    settings = {
        "output_dir": output,
        "data": root / "data",
        "cache_dir": root / "cache",
        "pretrained": root / "base",
        "resolution": 16,
        "batch_size": 2,
        "rank": 2,
        "learning_rate": 0.02,
        "max_text_tokens": tiny_models.MAX_TOKENS,
        "mixed_precision": "no",
        "warmup_steps": 1,
        "max_train_steps": 4,
        "ema_decay": 0.5,
        "sheet_steps": 2,
        "prefetch": 2,
        "trackers": "none",
    }
    script("train_lora").main(tiny_training.options({**settings, **changes}))
    return output


def draw(pipeline):
    return pipeline(
        "a red apple",
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def differ(first, second):
    return ImageChops.difference(first, second).getbbox() is not None


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_changes_the_picture_and_loads(root, kind):
    """Two steps, resumed for two more; the folder loads through load_lora_weights."""
    output = root / kind
    changes = {"dora": kind == "dora", "alpha": 4}
    whole = train(root, root / f"{kind}-whole", checkpoint_steps=2, keep_checkpoints=3, **changes)
    train(root, output, resume_from=whole / "checkpoint-2", **changes)
    name = "lora/pytorch_lora_weights.safetensors"
    one, other = load_file(whole / name), load_file(output / name)
    assert all(torch.equal(one[key], other[key]) for key in one)
    held = load_file(output / "checkpoint-4" / "model.safetensors")
    assert all("lora" in key for key in held)
    pipeline = GSPN2Pipeline.from_pretrained(root / "base")
    before = draw(pipeline)
    pipeline.load_lora_weights(output / "lora")
    after = draw(pipeline)
    assert differ(before, after)
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 4
    assert pipeline.transformer.peft_config["default_0"].use_dora == (kind == "dora")
    pipeline.unload_lora_weights()
    assert not differ(before, draw(pipeline))
    card = (output / "lora" / "README.md").read_text()
    assert 'from_pretrained("base")' in card
    assert str(root) not in card.split("## Training")[0]


def test_dreambooth_draws_its_class_and_trains_on_both(root):
    classes = root / "class"
    changes = {
        "caption": "a red rocket style",
        "class_data": classes,
        "class_prompt": "a rocket",
        "class_pictures": 3,
        "target_modules": "*.mixer.*",
        "save_pipeline": True,
    }
    output = train(root, root / "dreambooth", **changes)
    assert {Image.open(path).size for path in classes.glob("*.png")} == {(16, 16)}
    assert len(list(classes.glob("*.png"))) == 3
    keys = load_file(output / "lora" / "pytorch_lora_weights.safetensors")
    assert all(".mixer." in key for key in keys)
    fused = GSPN2Pipeline.from_pretrained(output / "pipeline")
    tuned = GSPN2Pipeline.from_pretrained(root / "base")
    tuned.load_lora_weights(output / "lora")
    weight = "transformer_blocks.0.mixer.to_out.weight"
    plain = tuned.transformer.get_submodule("transformer_blocks.0.mixer.to_out").base_layer.weight
    assert not torch.equal(fused.transformer.get_parameter(weight), plain)
    losses = [json.loads(line).get("loss") for line in (output / "metrics.jsonl").read_text().splitlines()]
    alone = train(root, root / "alone", target_modules="*.mixer.*")
    others = [json.loads(line).get("loss") for line in (alone / "metrics.jsonl").read_text().splitlines()]
    first, second = (next(value for value in values if value) for values in (losses, others))
    assert first > 1.3 * second  # the class counts as much as the pictures


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "*.nothing"}, "fits no linear layer"),
        ({"class_prompt": "a dog"}, "belong together"),
        ({"rank": 0}, "`rank` is 0"),
        ({"pretrained": "/nowhere/at/all"}, "nowhere"),
    ],
)
def test_wrong_settings_end_with_one_line(root, tmp_path, changes, words):
    with pytest.raises(SystemExit, match=words):
        train(root, tmp_path / "run", **changes)
