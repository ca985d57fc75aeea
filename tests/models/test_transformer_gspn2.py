"""GSPN2Transformer2DModel: forward and backward."""

from __future__ import annotations

import pytest
import torch
from tiny_denoiser import CONFIG, make_inputs, make_model, randomize

from gspn2_diffusion import GSPN2Transformer2DModel
from gspn2_diffusion.models.initialization import initialize_for_training

MIXERS = ["gspn2", "softmax", "linear", "none"]


@pytest.mark.parametrize("mixer", [*MIXERS, ["softmax", "gspn2"]])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (10, 6), (2, 14)])
def test_any_grid_with_any_mixer(mixer, height, width):
    model = make_model(mixer=mixer, out_channels=5)
    inputs = make_inputs(height, width)
    with torch.no_grad():
        sample = model(**inputs).sample
        (same,) = model(**inputs, return_dict=False)
    assert sample.shape == (2, 5, height, width)
    assert torch.isfinite(sample).all()
    assert torch.equal(sample, same)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patchify_and_unpatchify_are_inverse_and_row_major(patch):
    model = make_model(patch_size=patch, num_layers=1)
    latents = torch.randn(2, 3, 2 * patch, 4 * patch)
    tokens = model._patchify(latents)
    assert tokens.shape == (2, 8, patch * patch * 3)
    second = latents[:, :, :patch, patch : 2 * patch].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(tokens[:, 1], second)
    assert torch.equal(model._unpatchify(tokens, 2, 4), latents)


def test_a_fresh_model_answers_to_every_input():
    torch.manual_seed(0)
    model, inputs = GSPN2Transformer2DModel(**CONFIG), make_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        assert 0.1 < expected.std() < 10
        for name in ("timestep", "encoder_hidden_states", "pooled_projections", "hidden_states"):
            changed = model(**{**inputs, name: inputs[name] + 50 * (name == "timestep") + 1}).sample
            assert (changed - expected).abs().max() > 1e-3, name


def test_a_model_to_be_trained_starts_at_exactly_zero_and_leaves_there_in_two_steps():
    torch.manual_seed(0)
    model = GSPN2Transformer2DModel(**CONFIG)
    initialize_for_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, target = make_inputs(), torch.randn(2, 3, 6, 10)
    assert (model(**inputs).sample == 0).all()
    for _ in range(3):
        optimizer.zero_grad()
        (model(**inputs).sample - target).square().mean().backward()
        optimizer.step()
    for block in model.transformer_blocks:
        assert (block.mixer.to_out.weight.grad != 0).any()
        assert (block.scale_shift_table.grad != 0).any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_gets_a_gradient(mixer):
    model = make_model(mixer=mixer)
    model(**make_inputs()).sample.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = make_model().train(), make_model().train()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    checkpointed.transformer_blocks[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    for model in (plain, checkpointed):
        outputs.append(model(**make_inputs()).sample)
        outputs[-1].square().sum().backward()
    assert len(calls) == 2  # recomputed in the backward pass
    assert torch.equal(*outputs)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        # Sums over tokens, of terms that cancel: as exact as the largest of them.
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_text_does_not_matter(dtype):
    model, inputs = make_model(), make_inputs()
    inputs["encoder_attention_mask"] = inputs["encoder_attention_mask"].to(dtype)
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][:, 3:] = 100.0
    shorter = {
        **inputs,
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, :3],
        "encoder_attention_mask": None,
    }
    with torch.no_grad():
        expected = model(**inputs).sample
        assert torch.equal(model(**changed).sample, expected)
        torch.testing.assert_close(model(**shorter).sample, expected)
        everything = model(**{**inputs, "encoder_attention_mask": None}).sample
    assert not torch.allclose(everything, expected, atol=1e-3)


def test_fully_masked_text_stays_finite():
    model, inputs = make_model(), make_inputs()
    inputs["encoder_attention_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    assert torch.isfinite(model(**inputs).sample).all()


def test_each_condition_matters_and_samples_do_not_mix():
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs).sample
        for name in ("timestep", "encoder_hidden_states", "pooled_projections", "hidden_states"):
            changed = {**inputs, name: inputs[name].clone()}
            changed[name][0] += 50.0 if name == "timestep" else torch.randn_like(changed[name][0])
            sample = model(**changed).sample
            assert not torch.allclose(sample[0], expected[0], atol=1e-4), name
            torch.testing.assert_close(sample[1], expected[1], msg=name)


def test_timestep_of_any_form():
    model, inputs = make_model(), make_inputs()
    forms = [torch.tensor(500.0), torch.tensor([500]), torch.tensor([500, 500]), torch.tensor(500)]
    with torch.no_grad():
        samples = [model(**{**inputs, "timestep": form}).sample for form in forms]
    assert all(torch.equal(samples[0], sample) for sample in samples[1:])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(mixer, dtype):
    model, inputs = make_model(mixer=mixer), make_inputs()
    floating = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    half = {**inputs, **{name: inputs[name].to(dtype) for name in floating}}
    with torch.no_grad():
        expected = model(**inputs).sample
        sample = model.to(dtype)(**half).sample
    assert sample.dtype == dtype
    assert (sample.float() - expected).norm() < (0.1 if dtype == torch.bfloat16 else 0.02) * expected.norm()


@pytest.mark.parametrize("mixer", MIXERS)
def test_autocast_with_backward(mixer):
    model, inputs = make_model(mixer=mixer), make_inputs()
    expected = model(**inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample = model(**inputs).sample
    sample.float().square().sum().backward()
    assert (sample.float() - expected).norm() < 0.1 * expected.norm()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_set_scan_backend_reaches_every_kernel():
    model = make_model(mixer=["gspn2", "gspn2"])
    model.set_scan_backend("reference")
    for block in model.transformer_blocks:
        assert block.mixer.backend == block.local_perception.backend == block.norm_backend == "reference"
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'"):
        model.set_scan_backend("triton")
    model.set_scan_backend("cupy")
    with pytest.raises((ValueError, RuntimeError), match="cupy"):
        model(**make_inputs())  # no silent fall-back to the reference


def test_the_output_layer_modulates_by_the_timestep():
    model = make_model(num_layers=1, pooled_projection_dim=None)
    randomize(model, seed=3)
    inputs = make_inputs(pooled=False)
    seen = {}
    model.norm_out.register_forward_hook(lambda module, args, out: seen.update(normed=out))
    model.proj_out.register_forward_pre_hook(lambda module, args: seen.update(modulated=args[0]))
    with torch.no_grad():
        model(**inputs)
        _, embedded = model.time_embed(inputs["timestep"], None, torch.float32)
    shift, scale = (model.scale_shift_table[i] + embedded[:, None] for i in range(2))
    torch.testing.assert_close(seen["modulated"], seen["normed"] * (1 + scale) + shift)


def test_a_fresh_model_learns_a_fixed_batch():
    torch.manual_seed(0)
    model = GSPN2Transformer2DModel(**CONFIG)
    initialize_for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs, target = make_inputs(), torch.randn(2, 3, 6, 10)
    losses = []
    for _ in range(40):
        loss = (model(**inputs).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
