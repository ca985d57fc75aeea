"""LoRA on the pipeline: loading, weights, fusing, swapping, and that rank and alpha survive the file."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from same_weights import assert_same_weights
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "to_proxy", "to_scan", "mixer.to_out"]
FILE = "pytorch_lora_weights.safetensors"


# Latents are compared up to 1e-4: they reach 10, of which float32 keeps 1e-6, and guidance and steps make
# that rounding grow; what another adapter or weight does is a hundred times larger (see `> 0.01` below).
def latents_of(pipe: GSPN2Pipeline, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", **options}
    return pipe("a red apple", **settings).images


def with_adapter(name: str = "first", seed: int = 7, std: float = 0.3, **config: Any) -> GSPN2Pipeline:
    """A pipeline with one trained-looking adapter on the attention's and the mixer's projections."""
    pipe = build_tiny_pipeline()
    settings = {"r": 4, "lora_alpha": 10, "target_modules": TARGETS, "init_lora_weights": False, **config}
    pipe.transformer.add_adapter(peft.LoraConfig(**settings), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in pipe.transformer.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if "lora_magnitude" in key:
            parameter.data.mul_(1 + torch.rand(parameter.shape, generator=generator))
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of rank 4 ("first", "second") and one of rank 2 ("small"), alpha unlike the rank."""
    folder = tmp_path_factory.mktemp("lora")
    with_adapter().save_lora_weights(folder / "first")
    with_adapter(seed=8).save_lora_weights(folder / "second")
    with_adapter(seed=9, r=2, lora_alpha=5).save_lora_weights(folder / "small")
    return folder


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return latents_of(build_tiny_pipeline())


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"rank_pattern": {"to_scan": 6}, "alpha_pattern": {"to_scan": 3}}],
    ids=["lora", "dora", "patterns"],
)
def test_rank_and_alpha_survive_the_round_trip(
    tmp_path: Path, plain: torch.Tensor, config: dict[str, Any]
) -> None:
    source = with_adapter(**config)
    expected = latents_of(source)
    assert (expected - plain).abs().max() > 0.01
    source.save_lora_weights(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]  # nothing half-written stays
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(tmp_path / FILE, adapter_name="again")
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-4, rtol=0)
    loaded = pipe.transformer.peft_config["again"]
    assert (loaded.r, loaded.lora_alpha, loaded.use_dora) == (4, 10, bool(config.get("use_dora")))
    targets = {key.split(".lora_A")[0] for key in pipe.transformer.state_dict() if ".lora_A" in key}
    assert {"to_proxy", "to_scan", "to_out", "to_q"} <= {target.rsplit(".", 1)[-1] for target in targets}


def test_saving_on_the_class_as_training_scripts_do(tmp_path: Path) -> None:
    source = with_adapter()
    GSPN2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.utils.get_peft_model_state_dict(
            source.transformer, adapter_name="first"
        ),
        transformer_lora_adapter_metadata=source.transformer.peft_config["first"].to_dict(),
        weight_name="mine.safetensors",
    )
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(str(tmp_path), weight_name="mine.safetensors")
    torch.testing.assert_close(latents_of(pipe), latents_of(source), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="transformer_lora_layers"):
        GSPN2Pipeline.save_lora_weights(tmp_path)


def test_weights_switching_and_removal(saved: Path, plain: torch.Tensor) -> None:
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(saved / "first", adapter_name="a")
    first = latents_of(pipe)
    torch.testing.assert_close(latents_of(pipe, attention_kwargs={"scale": 0.0}), plain, atol=1e-4, rtol=0)
    pipe.load_lora_weights(saved / "second", adapter_name="b")
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert sorted(pipe.get_active_adapters()) == ["a", "b"]
    torch.testing.assert_close(latents_of(pipe), first, atol=1e-4, rtol=0)
    pipe.set_adapters(["a", "b"], [0.5, 0.8])
    both = latents_of(pipe)
    assert (both - first).abs().max() > 0.01
    pipe.set_adapters("b", 0.5)
    assert pipe.get_active_adapters() == ["b"]
    half = latents_of(pipe)
    pipe.set_adapters("b", 1.0)
    torch.testing.assert_close(latents_of(pipe, attention_kwargs={"scale": 0.5}), half, atol=1e-4, rtol=0)
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"transformer": ["a"]}
    pipe.set_adapters("a")
    torch.testing.assert_close(latents_of(pipe), first, atol=1e-4, rtol=0)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe), plain)
    assert not hasattr(pipe.transformer, "peft_config")


def test_fuse_and_unfuse(saved: Path, plain: torch.Tensor) -> None:
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(saved / "first", adapter_name="a")
    expected = latents_of(pipe)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-4, rtol=0)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(latents_of(pipe), expected, atol=1e-4, rtol=0)
    pipe.fuse_lora(lora_scale=0.0)
    torch.testing.assert_close(latents_of(pipe), plain, atol=1e-4, rtol=0)


def test_fused_without_adapter_layers_saves_and_loads_as_a_plain_model(saved: Path, tmp_path: Path) -> None:
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(saved / "first")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    expected = latents_of(pipe)
    pipe.save_pretrained(tmp_path)
    again = GSPN2Pipeline.from_pretrained(tmp_path)
    assert_same_weights(again, pipe)
    torch.testing.assert_close(latents_of(again), expected, atol=1e-4, rtol=0)


def test_hotswap(saved: Path) -> None:
    expected = {}
    for name in ("second", "small"):
        other = build_tiny_pipeline()
        other.load_lora_weights(saved / name)
        expected[name] = latents_of(other)
    pipe = build_tiny_pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(saved / "first", adapter_name="slot")
    parameters = {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}
    for name in ("second", "small"):
        pipe.load_lora_weights(saved / name, adapter_name="slot", hotswap=True)
        torch.testing.assert_close(latents_of(pipe), expected[name], atol=1e-4, rtol=0)
    assert parameters == {name: id(parameter) for name, parameter in pipe.transformer.named_parameters()}


def test_hotswap_that_cannot_work(saved: Path) -> None:
    pipe = build_tiny_pipeline()
    pipe.load_lora_weights(saved / "small", adapter_name="slot")
    before = latents_of(pipe)
    with pytest.raises(
        ValueError, match=r"room for rank 2.*rank 4; call `enable_lora_hotswap\(target_rank=4\)`"
    ):
        pipe.load_lora_weights(saved / "first", adapter_name="slot", hotswap=True)
    with pytest.raises(ValueError, match=r"unknown LoRA adapters: \['other'\] not in .*\['slot'\]"):
        pipe.load_lora_weights(saved / "first", adapter_name="other", hotswap=True)
    with pytest.raises(ValueError, match="`adapter_name` is needed"):
        pipe.load_lora_weights(saved / "first", hotswap=True)
    assert torch.equal(latents_of(pipe), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.set_adapters(["a", "b"]),
        lambda pipe: pipe.delete_adapters("b"),
        lambda pipe: pipe.fuse_lora(adapter_names=["b"]),
        lambda pipe: pipe.save_lora_weights("nowhere", adapter_name="b"),
    ],
)
def test_unknown_adapters(saved: Path, call: Any) -> None:
    pipe = build_tiny_pipeline()
    with pytest.raises(ValueError, match=r"unknown LoRA adapters: .*none loaded"):
        call(pipe)
    pipe.load_lora_weights(saved / "first", adapter_name="a")
    with pytest.raises(ValueError, match=r"\['b'\] not in the list of present adapters: \['a'\]"):
        call(pipe)
    with pytest.raises(ValueError, match="a already in use"):
        pipe.load_lora_weights(saved / "first", adapter_name="a")
    assert not Path("nowhere").exists()


def test_saving_needs_one_adapter(saved: Path, tmp_path: Path) -> None:
    pipe = build_tiny_pipeline()
    with pytest.raises(ValueError, match="0 adapters are active"):
        pipe.save_lora_weights(tmp_path)
    pipe.load_lora_weights(saved / "first", adapter_name="a")
    pipe.load_lora_weights(saved / "small", adapter_name="b")
    pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match="`adapter_name` is needed: 2 adapters are active"):
        pipe.save_lora_weights(tmp_path)
    pipe.save_lora_weights(tmp_path, adapter_name="b")
    again = build_tiny_pipeline()
    again.load_lora_weights(tmp_path, adapter_name="b")
    assert again.transformer.peft_config["b"].r == 2


KEY = "transformer.transformer_blocks.0.cross_attn.to_q"
PAIR = {f"{KEY}.lora_A.weight": torch.zeros(3, 16), f"{KEY}.lora_B.weight": torch.zeros(16, 3)}

PAIR_OF_K = {key.replace("to_q", "to_k"): value for key, value in PAIR.items()}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (
            {**PAIR, f"{KEY}.lora_B.weight": torch.zeros(16, 2)},
            "mismatched ranks: lora_A has 3, lora_B has 2",
        ),
        ({**PAIR, f"{KEY}.lora_B.weight": torch.zeros(9, 3)}, r"made for weights \(9, 16\).*\(16, 16\)"),
        (
            {key.replace("to_q", "to_nothing"): value for key, value in PAIR.items()},
            "another model.*to_nothing",
        ),
    ],
    ids=["ranks", "shape", "module"],
)
def test_files_that_do_not_fit(pipe: GSPN2Pipeline, state_dict: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(state_dict)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(PAIR)  # and a right one still goes in
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}


@pytest.mark.parametrize(
    ("state_dict", "warning"),
    [
        ({f"{KEY}.lora_A.weight": PAIR[f"{KEY}.lora_A.weight"], **PAIR_OF_K}, "missing keys"),
        ({key.replace("transformer.tr", "unet.tr"): value for key, value in PAIR.items()}, "No LoRA keys"),
    ],
    ids=["half", "prefix"],
)
def test_what_diffusers_warns_of(
    pipe: GSPN2Pipeline, caplog: pytest.LogCaptureFixture, state_dict: dict[str, Any], warning: str
) -> None:
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    try:
        pipe.load_lora_weights(state_dict)
    finally:
        logger.propagate = False
    assert warning in caplog.text


def test_metadata_of_another_rank(saved: Path, tmp_path: Path, pipe: GSPN2Pipeline) -> None:
    from safetensors import safe_open

    with safe_open(str(saved / "first" / FILE), framework="pt") as file:
        metadata = file.metadata()
    key = next(key for key in metadata if key != "format")
    wrong = {**metadata, key: metadata[key].replace('"transformer.r": 4', '"transformer.r": 8')}
    assert wrong != metadata
    weights = safetensors.torch.load_file(saved / "first" / FILE)
    safetensors.torch.save_file(weights, tmp_path / FILE, metadata=wrong)
    with pytest.raises(ValueError, match=r"metadata has the ranks \[8\].*has rank 4"):
        pipe.load_lora_weights(tmp_path)


def test_pickled_adapters_are_never_read(tmp_path: Path, pipe: GSPN2Pipeline) -> None:
    torch.save(PAIR, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises((OSError, ValueError)):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"safetensors file, got 'pytorch_lora_weights\.bin'"):
        pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.bin")
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        pipe.load_lora_weights(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match="`safe_serialization` must be True"):
        pipe.save_lora_weights(tmp_path, safe_serialization=False)


@pytest.mark.slow
def test_without_peft_pipelines_work_and_lora_says_what_is_missing() -> None:
    program = (
        "import sys; sys.modules['peft'] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from tiny_models import build_tiny_pipeline\n"
        "pipe = build_tiny_pipeline(); pipe('a', num_inference_steps=1)\n"
        "try: pipe.load_lora_weights({})\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "`load_lora_weights` needs the package peft" in done.stdout
