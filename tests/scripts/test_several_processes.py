"""Runs of several processes: DDP, FSDP2, validation on one of them, and going on with another number."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import tiny_pictures
import tiny_training
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import training_forks as forks

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}

ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    tiny_pictures.write_folder(folder / "data", count=22, size=(16, 16))
    tiny_training.write_models(folder / "models")
    return folder


def options(root, output, **changes):
    settings = {
        "data": root / "data",
        "cache_dir": root / "cache",
        "sheet_prompts": "none",
        "trackers": "none",
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "checkpoint_steps": 2,
        "validate_steps": 1,
        "sample_steps": 2,
        "keep_checkpoints": 3,
    }
    return tiny_training.denoiser_options(root, output, **{**settings, **changes})


@pytest.fixture(scope="module")
def ddp(root):
    assert forks.train_together("train_text_to_image", options(root, root / "ddp"), 2) == [0, 0]
    return root / "ddp"


BFLOAT16_STEP = 2**-7  # from one value to the next: those that are nearly equal may be rounded apart


def close(first, second, name, atol=2e-5, rtol=1e-3):
    one, other = load_file(first / name), load_file(second / name)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=atol, rtol=rtol)


def apart(first, second, start, name):
    """How far two runs ended from each other, as a share of how far the first one went from its start."""
    ends = [load_file(folder / name) for folder in (first, second, start)]
    one, other, begun = (torch.cat([end[key].flatten() for key in sorted(end)]) for end in ends)
    return float((one - other).norm() / (one - begun).norm())


def test_two_processes_share_the_work_and_write_once(ddp):
    state = json.loads((ddp / "checkpoint-4" / "state.json").read_text())
    assert state["pictures"] == 4 * 2 * 2 * 2
    lines = [json.loads(line) for line in (ddp / "metrics.jsonl").read_text().splitlines()]
    assert sum("val_held_out" in line for line in lines) == 5
    assert (ddp / "pipeline" / "README.md").is_file()


def test_split_weights_go_on_as_whole_ones_do(root, ddp):
    """FSDP2 from the checkpoint of the DDP run: the same weights, each process holding half of them."""
    output = root / "fsdp"
    changes = {"resume_from": ddp / "checkpoint-2"}
    codes = forks.train_together("train_text_to_image", options(root, output, **changes), 2, **FSDP2)
    assert codes == [0, 0]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        close(ddp / "checkpoint-4", output / "checkpoint-4", name)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    total = sum(tensor.numel() for tensor in load_file(ddp / "checkpoint-4" / "model.safetensors").values())
    here = next(line["weights_here"] for line in lines if "weights_here" in line)
    assert here == pytest.approx(total / 2, rel=0.2)
    assert sum("val_held_out" in line for line in lines) == 3


def test_another_number_of_processes_goes_on(root, ddp):
    alone = root / "alone"
    changes = {"resume_from": ddp / "checkpoint-2", "gradient_accumulation_steps": 4}
    assert forks.train("train_text_to_image", options(root, alone, **changes)) == 0
    state = json.loads((alone / "checkpoint-4" / "state.json").read_text())
    assert state["pictures"] == 4 * 8


def every_way(name, root, output, changes):
    """Folders of the same training by DDP, with split weights, and where it is installed by DeepSpeed."""
    found = []
    ways = {"ddp": {}, "fsdp2": FSDP2}
    if name == "distill" and find_spec("deepspeed"):
        ways["zero2"] = ZERO2
    for kind, environment in ways.items():
        folder = root / f"{output}-{kind}"
        settings = tiny_training.denoiser_options(root, folder, **changes)
        assert forks.train_together(name, settings, 2, **environment) == [0, 0]
        found.append(folder)
    return found


SHORT = {
    "sheet_prompts": "none",
    "trackers": "none",
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 2,
    "final_checkpoint": True,
}


def test_an_adapter_on_split_weights_is_the_same(root):
    """DreamBooth, whose class pictures rank 0 draws, with the frozen model split as well."""
    pytest.importorskip("peft")
    tiny_models.build_tiny_pipeline().save_pretrained(root / "base")
    changes = {
        **SHORT,
        "data": root / "data",
        "cache_dir": root / "cache",
        "pretrained": root / "base",
        "class_data": root / "class",
        "class_prompt": "a rocket",
        "class_pictures": 4,
        "rank": 2,
    }
    whole, split = every_way("train_lora", root, "lora", changes)
    close(whole, split, "lora/pytorch_lora_weights.safetensors")
    close(whole / "checkpoint-2", split / "checkpoint-2", "optimizer.safetensors")
    held = load_file(split / "checkpoint-2" / "model.safetensors")
    assert all("lora" in key for key in held)


def test_distillation_with_split_weights_is_the_same(root):
    pipeline = tiny_models.build_tiny_pipeline()
    pipeline.transformer = tiny_models.tiny_transformer(mixer="softmax", num_layers=2)
    pipeline.save_pretrained(root / "teacher")
    changes = {
        **SHORT,
        "data": root / "data",
        "cache_dir": root / "cache",
        "pretrained": root / "teacher",
        "stage1_steps": 2,
        "proxy_ratio": 4,
        "adapter_rank": 2,
    }
    whole, *others = every_way("distill", root, "distil", changes)
    for split in others:
        for folder in ("stage-1/checkpoint-2", "checkpoint-2"):
            for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
                close(whole / folder, split / folder, name)
        for end, losses in json.loads((whole / "gap.json").read_text()).items():
            assert json.loads((split / "gap.json").read_text())[end] == pytest.approx(losses, rel=1e-5)
        close(whole, split, "transformer/diffusion_pytorch_model.safetensors", rtol=BFLOAT16_STEP)


@pytest.mark.gpu
def test_two_gpus_then_one(tmp_path):
    """DDP over NCCL, the rest of it with split weights, and the rest of it on one GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tiny_training.write_models(tmp_path / "models")
    changes = {
        "compile": False,
        "data": tiny_training.write_emoji(tmp_path / "emoji"),  # folders of pictures would need `datasets`
        "sprite_cache": tmp_path / "sprites",
        "sheet_prompts": tiny_training.write_prompts(tmp_path / "prompts.json"),
    }
    both = tmp_path / "both"
    assert forks.train_together("train_text_to_image", options(tmp_path, both, **changes), 2) == [0, 0]
    changes["resume_from"] = both / "checkpoint-2"
    split = tmp_path / "split"
    codes = forks.train_together("train_text_to_image", options(tmp_path, split, **changes), 2, **FSDP2)
    assert codes == [0, 0]
    for name in ("model.safetensors", "ema.safetensors"):
        close(both / "checkpoint-4", split / "checkpoint-4", name, atol=2e-3)  # Adam enlarges rounding
        # Two steps move no weight further than that, so what they did together is compared as well.
        assert apart(both / "checkpoint-4", split / "checkpoint-4", both / "checkpoint-2", name) < 0.1
    alone = tmp_path / "alone"
    more = {**changes, "gradient_accumulation_steps": 4}
    assert forks.train("train_text_to_image", options(tmp_path, alone, **more)) == 0
    state = json.loads((alone / "checkpoint-4" / "state.json").read_text())
    assert state["pictures"] == 4 * 8


def test_deepspeed_is_the_same(root, ddp):
    """ZeRO 2 from the checkpoint of the DDP run; another run goes on from what it wrote."""
    pytest.importorskip("deepspeed")
    output = root / "zero"
    changes = {"resume_from": ddp / "checkpoint-2", "checkpoint_steps": 1}
    codes = forks.train_together("train_text_to_image", options(root, output, **changes), 2, **ZERO2)
    assert codes == [0, 0]
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        close(ddp / "checkpoint-4", output / "checkpoint-4", name)
    assert not list(output.rglob("*.pt"))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    total = sum(tensor.numel() for tensor in load_file(ddp / "checkpoint-4" / "ema.safetensors").values())
    here = next(line["optimizer_state_here"] for line in lines if "optimizer_state_here" in line)
    assert here == pytest.approx(total / 2, rel=0.2)
    again = root / "zero-again"
    changes = {"resume_from": output / "checkpoint-3", "gradient_accumulation_steps": 4}
    assert forks.train("train_text_to_image", options(root, again, **changes)) == 0
