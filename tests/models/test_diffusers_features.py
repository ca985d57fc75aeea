"""What users of diffusers expect of a model: saving, LoRA, hooks, caches, compiling."""

from __future__ import annotations

import json

import pytest
import torch
from same_weights import assert_same_weights
from tiny_denoiser import make_inputs, make_model

from gspn2_diffusion import GSPN2Transformer2DModel


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_save_and_load(tmp_path, shard):
    model = make_model(mixer=["gspn2", "softmax"])
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    weights = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(weights) > 1) == (shard is not None)
    assert not list(tmp_path.glob("*.bin"))
    loaded = GSPN2Transformer2DModel.from_pretrained(tmp_path)
    assert dict(loaded.config)["mixer"] == ["gspn2", "softmax"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**make_inputs()).sample, model(**make_inputs()).sample)
    assert_same_weights(loaded, model)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "GSPN2Transformer2DModel"


def test_load_in_half_precision(tmp_path):
    make_model().save_pretrained(tmp_path, variant="fp16")
    loaded = GSPN2Transformer2DModel.from_pretrained(tmp_path, variant="fp16", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_the_state_dict_names_are_stable():
    names = {
        name.split(".", 2)[-1]
        for name in make_model().state_dict()
        if name.startswith("transformer_blocks.0")
    }
    assert {"mixer.to_proxy.weight", "mixer.to_scan.weight", "mixer.to_out.weight"} <= names
    assert {f"cross_attn.{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0")} <= names
    assert {"ff.net.0.proj.weight", "ff.net.2.weight", "local_perception.conv.weight"} <= names
    assert {"scale_shift_table", "cross_attn.norm_q.weight", "cross_attn.norm_k.weight"} <= names


def test_lora_on_the_mixer_projections(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).sample
    model.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_proxy", "to_scan", "mixer.to_out", "to_q"])
    )
    targets = {n.split(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    block = "transformer_blocks.0."
    names = ("mixer.to_proxy", "mixer.to_scan", "mixer.to_out", "cross_attn.to_q")
    assert {block + name for name in names} <= targets
    torch.testing.assert_close(model(**inputs).sample, expected)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    changed = model(**inputs).sample
    assert not torch.allclose(changed, expected, atol=1e-2)
    torch.testing.assert_close(model(**inputs, attention_kwargs={"scale": 0.0}).sample, expected)
    torch.testing.assert_close(model(**inputs).sample, changed)
    changed.square().sum().backward()
    assert all((p.grad != 0).any() for n, p in model.named_parameters() if ".lora_" in n)
    model.save_lora_adapter(tmp_path)
    other = make_model()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**inputs).sample, changed)
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs).sample, expected)


def test_attention_processors_find_their_modules():
    model = make_model(mixer=["softmax", "gspn2"])
    assert set(model.attn_processors) == {
        "transformer_blocks.0.mixer.processor",
        "transformer_blocks.0.cross_attn.processor",
        "transformer_blocks.1.cross_attn.processor",
    }
    before = model(**make_inputs()).sample
    model.set_attn_processor(model.attn_processors)
    assert torch.equal(model(**make_inputs()).sample, before)
