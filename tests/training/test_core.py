"""Settings, schedule, optimisers, bank, checkpoints."""

import json

import pytest
import tiny_models
import torch
from torch import nn

from gspn2_diffusion.training import checkpoint as ckpt
from gspn2_diffusion.training.config import AutoencoderConfig, ConfigError, DenoiserConfig, parse_config
from gspn2_diffusion.training.latents import LatentBank, LatentBatch
from gspn2_diffusion.training.losses import draw_sigmas, edge_loss, flow_matching_errors, psnr, ssim_loss
from gspn2_diffusion.training.optim import GroupedMuon, build_optimizer, set_learning_rate
from gspn2_diffusion.training.schedule import Conductor, learning_rate_factor
from gspn2_diffusion.training.text import CaptionTokenizer, TextStates, encode_text


def test_options_win_over_the_file_and_text_numbers_are_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: here\nlearning_rate: 3e-4\nbatch_size: 7\nmax_train_steps: 5\ncompile: false\n"
    )
    config = parse_config(AutoencoderConfig, ["--config", str(file), "--batch_size", "9"])
    assert (config.learning_rate, config.batch_size, config.compile) == (3e-4, 9, False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learning_rat: 1", "did you mean `learning_rate`"),
        ("batch_size: many", "batch_size"),
        ("optimizer: sgd", "adamw, adamw8bit, muon"),
        ("resolution: 100", "multiples of 8"),
        ("validate_steps: 0", "validate_steps"),
    ],
)
def test_bad_settings_are_named(tmp_path, content, words):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: here\nmax_train_steps: 5\n{content}\n")
    with pytest.raises(ConfigError, match=words):
        parse_config(AutoencoderConfig, ["--config", str(file)])


def test_unknown_option_and_missing_budget(tmp_path):
    with pytest.raises(ConfigError, match="did you mean `batch_size`"):
        parse_config(AutoencoderConfig, ["--output_dir", "x", "--batchsize", "3"])
    with pytest.raises(ConfigError, match="max_train_minutes"):
        parse_config(AutoencoderConfig, ["--output_dir", "x"])
    with pytest.raises(ConfigError, match="pretrained"):
        parse_config(DenoiserConfig, ["--output_dir", "x", "--max_train_steps", "1"])


def test_rate_warms_up_stays_and_ends_at_zero():
    assert learning_rate_factor(0.0, 0, 10, 0.2) == pytest.approx(0.1)
    assert learning_rate_factor(0.5, 100, 10, 0.2) == 1.0
    assert learning_rate_factor(0.9, 100, 10, 0.2) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 100, 10, 0.2) == 0.0
    assert learning_rate_factor(1.0, 100, 10, 0.0) == 1.0
    assert learning_rate_factor(0.25, 100, 10, 1.0, "cosine") == pytest.approx(0.5 + 0.5**1.5)
    assert learning_rate_factor(1.0, 100, 10, 1.0, "cosine") == pytest.approx(0.0)
    assert learning_rate_factor(1.0, 100, 10, 0.5, "constant") == 1.0


def test_conductor_follows_steps_and_minutes(monkeypatch):
    now = [600.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    config = AutoencoderConfig(output_dir="x", max_train_minutes=10, validate_minutes=2, checkpoint_steps=3)
    conductor = Conductor(config, started=600.0)
    assert conductor.tick(1).due == frozenset()
    now[0] += 150
    tick = conductor.tick(3)
    assert tick.due == {"validate", "checkpoint"}
    assert tick.progress == pytest.approx(0.25)
    assert conductor.tick(4).due == frozenset()
    now[0] += 451
    assert conductor.tick(5).stop


def test_grouped_muon_is_torch_muon():
    muon = pytest.importorskip("torch.optim", reason="torch.optim.Muon").__dict__.get("Muon")
    if muon is None:
        pytest.skip("this torch has no Muon")
    shapes = [(12, 8), (8, 12), (12, 8), (6, 6)]
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    options = {"lr": 0.02, "weight_decay": 0.1}
    first, second = GroupedMuon(ours, **options), muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        first.step()
        second.step()
    for one, other in zip(ours, theirs, strict=True):
        # bf16 iterations in another order of products
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


def test_optimizer_parts_and_state_round_trip():
    model = tiny_models.tiny_transformer()
    optimizer = build_optimizer(
        model, "muon", learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=False
    )
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for p in optimizer.parts[1].param_groups[0]["params"]}
    assert id(model.proj_out.weight) not in matrices
    assert id(model.patch_embed.weight) not in matrices
    assert len(matrices) > 4
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    set_learning_rate(optimizer, 0.5)
    assert {g["lr"] for part in optimizer.parts for g in part.param_groups} == {0.5}
    flat = ckpt.optimizer_tensors(optimizer.state_dict())
    fresh = build_optimizer(
        model, "muon", learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=False
    )
    fresh.load_state_dict(ckpt.optimizer_state(flat, fresh.state_dict()))
    again = ckpt.optimizer_tensors(fresh.state_dict())
    assert flat.keys() == again.keys()
    assert all(torch.equal(flat[key], again[key]) for key in flat)
    adamw = build_optimizer(
        model, "adamw", learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=False
    )
    with pytest.raises(ckpt.CheckpointError, match="optimizer"):
        ckpt.optimizer_state(flat, adamw.state_dict())


def batch_of(values):
    count = len(values)
    rows = torch.tensor(values, dtype=torch.float32)
    text = TextStates(
        rows.view(-1, 1, 1).expand(-1, 3, 2), torch.ones(count, 3, dtype=torch.bool), rows.view(-1, 1)
    )
    return LatentBatch(rows.view(-1, 1, 1, 1).expand(-1, 4, 2, 2), text)


def test_bank_replaces_the_oldest_and_keeps_rows_together():
    bank = LatentBank(4, batch_of([0, 0]))
    generator = torch.Generator().manual_seed(0)
    bank.write(0, batch_of([1, 2]))
    assert set(bank.draw(50, generator).text.pooled.flatten().tolist()) == {1.0, 2.0}
    bank.write(2, batch_of([3, 4]))
    bank.write(4, batch_of([5, 6]))
    found = bank.draw(200, generator)
    assert set(found.latents[:, 0, 0, 0].tolist()) == {3.0, 4.0, 5.0, 6.0}
    assert torch.equal(found.latents[:, 0, 0, 0], found.text.hidden[:, 0, 0])
    assert torch.equal(found.latents[:, 0, 0, 0], found.text.pooled[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_bank_keeps_the_type_of_the_text(dtype):
    text = TextStates(
        torch.rand(2, 3, 4).to(dtype), torch.ones(2, 3, dtype=torch.bool), torch.rand(2, 4).to(dtype)
    )
    batch = LatentBatch(torch.rand(2, 1, 2, 2), text)
    bank = LatentBank(2, batch)
    bank.write(0, batch)
    drawn = bank.draw(2, torch.Generator().manual_seed(0))
    assert drawn.latents.dtype == torch.float32
    assert {drawn.text.hidden.dtype, drawn.text.pooled.dtype} == {dtype}


def test_velocity_target_and_levels():
    class Exact(nn.Module):
        """Knows both ends, so its velocity is exact."""

        def forward(self, noisy, timestep, return_dict, wanted):
            assert torch.all((timestep >= 0) & (timestep <= 1000))
            level = (timestep / 1000).view(-1, 1, 1, 1)
            return ((noisy - wanted) / level,)  # (x_t - x_0) / sigma = noise - x_0

    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)
    sigmas = draw_sigmas(6, device=torch.device("cpu"), generator=generator)
    errors = flow_matching_errors(Exact(), clean, noise, sigmas, {"wanted": clean})
    assert float(errors.max()) < 1e-6
    many = draw_sigmas(20000, device=torch.device("cpu"), generator=generator)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    shifted = draw_sigmas(20000, shift=3.0, device=torch.device("cpu"), generator=generator)
    assert float(shifted.mean()) > 0.65


def test_picture_losses_rank_pictures():
    wanted = torch.rand(2, 3, 32, 32) * 2 - 1
    near, far = wanted + 0.01 * torch.randn_like(wanted), wanted + 0.3 * torch.randn_like(wanted)
    for loss in (edge_loss, ssim_loss):
        assert float(loss(wanted, wanted)) == pytest.approx(0, abs=1e-5)
        assert float(loss(near, wanted)) < float(loss(far, wanted))
    assert psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.2)).item() == pytest.approx(20.0)


def test_training_text_is_what_the_pipeline_encodes():
    pipeline = tiny_models.build_tiny_pipeline()
    captions = ["a red apple, flat style", "", "a red apple on a blue background, flat style, and much more"]
    tokenizer = CaptionTokenizer(pipeline.tokenizer, tiny_models.MAX_TOKENS)
    found = encode_text(pipeline.text_encoder, *tokenizer(captions))
    wanted = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert torch.equal(found.mask, wanted[1].bool())
    kept = found.mask.unsqueeze(-1)
    torch.testing.assert_close(found.hidden * kept, wanted[0] * kept)
    torch.testing.assert_close(found.pooled, wanted[4])


def test_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "checkpoint-1"
    ckpt.write_folder(target, {"a.safetensors": {"x": torch.ones(2)}}, {"step": 1})

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ckpt, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        ckpt.write_folder(target, {"a.safetensors": {"x": torch.zeros(2)}}, {"step": 2})
    assert json.loads((target / "state.json").read_text())["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_compact_files_stay_below_the_limit():
    tensors = {f"w{i}": torch.randn(100, 10) for i in range(7)}
    files = ckpt.compact_files(tensors, limit=5000)
    assert len(files) == 4
    assert all(sum(t.numel() * 2 for t in group.values()) <= 5000 for group in files.values())
    assert [name for group in files.values() for name in group] == list(tensors)


def test_resume_wants_a_checkpoint(tmp_path):
    assert ckpt.find_resume("latest", tmp_path) is None
    with pytest.raises(ckpt.CheckpointError, match="no checkpoint"):
        ckpt.find_resume(str(tmp_path), tmp_path)
