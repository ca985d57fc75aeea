"""The comparison: equal parameters, honest tables made from result files."""

import json
from pathlib import Path

import pytest
import torch

from gspn2_diffusion.evaluation import step_time
from gspn2_diffusion.evaluation.comparison import count_parameters, hybrid_layers, read_run, variants
from gspn2_diffusion.evaluation.document import TRANSFER_SHEET, plot, write_document
from gspn2_diffusion.evaluation.step_time import time_steps
from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

ROOT = Path(__file__).parents[2]
BASE = json.loads((ROOT / "configs" / "gspn2-emoji-transformer.json").read_text())


@pytest.fixture(scope="module")
def mixers():
    return variants("mixers", BASE)


def test_the_compared_mixers_have_equal_parameters(mixers):
    assert set(mixers) == {"gspn2", "softmax", "hybrid", "linear"}
    counts = {name: count_parameters(config) for name, config in mixers.items()}
    assert max(counts.values()) < 1.01 * min(counts.values()), counts
    assert mixers["gspn2"] == {**BASE, "mixer": "gspn2"}
    more = variants("mixers", BASE, more=True)
    assert {name: more[name] for name in mixers} == mixers
    assert len(more) == 7
    assert all(count_parameters(config) < 1.01 * min(counts.values()) for config in more.values())
    assert more["gspn2-proxy-C/2"]["proxy_dim"] == 192
    for config in mixers.values():
        kept = {key: value for key, value in config.items() if key not in ("mixer", "mlp_ratio")}
        assert kept == {key: value for key, value in BASE.items() if key not in ("mixer", "mlp_ratio")}


def test_the_hybrid_has_attention_in_one_of_six_layers():
    assert hybrid_layers(12).count("softmax") == 2
    assert hybrid_layers(6) == ["gspn2", "gspn2", "gspn2", "softmax", "gspn2", "gspn2"]


def test_parameters_are_counted_as_the_whole_model_has_them():
    config = {**BASE, "num_layers": 3, "mixer": ["gspn2", "softmax", "gspn2"]}
    with torch.device("meta"):
        model = GSPN2Transformer2DModel.from_config(config)
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_every_ablation_can_be_built():
    for name, config in variants("ablations", BASE).items():
        assert count_parameters(config) > 1e7, name
    with pytest.raises(ValueError, match="allowed: mixers, ablations"):
        variants("pears", BASE)


def write_run(folder, losses, speed):
    folder.mkdir(parents=True)
    rows = [{"commit": "x", "processes": 1}]
    for number, loss in enumerate(losses):
        rows.append(
            {"step": number * 10, "pictures": number * 5000, "val_unseen_pair": loss, "val_train": 0.1}
        )
        rows.append(
            {"step": number * 10 + 5, "pictures": number * 5000 + 2500, "speed": speed, "memory": 3.5}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_read_from_its_metrics(tmp_path):
    facts = read_run(write_run(tmp_path / "run", [2.0, 0.3, 0.25], 1000.0))
    assert [point["val_unseen_pair"] for point in facts["validation"]] == [2.0, 0.3, 0.25]
    assert facts["pictures_per_second"] == 1000.0
    assert facts["step_milliseconds"] == pytest.approx(500.0)
    assert facts["memory_gib"] == 3.5
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "nothing")


def study(tmp_path):
    score = {"value": 0.8, "low": 0.7, "high": 0.9, "count": 50, "ceiling": 0.95}
    evaluation = {
        "settings": {"height": 256, "width": 256, "steps": 20, "guidance": 4.0, "model": "m"},
        "scores": {"background": score, "relation/pair": score},
    }
    sized = {**evaluation, "settings": {**evaluation["settings"], "height": 384, "width": 384}}
    found = {}
    for name, losses in (("gspn2", [2.0, 0.204]), ("softmax", [2.0, 0.2])):
        found[name] = {
            "parameters": 18_000_000,
            **read_run(write_run(tmp_path / name, losses, 900.0)),
            "evaluation": {"results": evaluation, "results-384x384": sized},
        }
    return {
        "study": "mixers",
        "settings": {"steps": 20, "batch": 500, "seed": 0, "other": []},
        "environment": {"gpu": "NVIDIA H200", "date": "2026-11-22T00:00:00", "torch": "2.11.0"},
        "variants": found,
        "failed": ["linear"],
    }


def test_the_document_says_what_the_files_say(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    empty = write_document(results, tmp_path / "docs" / "results.md").read_text()
    assert empty.count("Not measured yet.") == 4
    facts = study(tmp_path)
    (results / "mixers.json").write_text(json.dumps(facts))
    one = {
        **facts["variants"]["gspn2"]["evaluation"]["results"],
        "prompt_set": "v1-abc",
        "judge": {"unseen_pairs_top1": 0.75, "judge_steps": 5},
        "judge_frechet_distance": {"value": 3.0, "low": 2.5, "high": 3.5, "real": 0.5, "pictures": 40},
        "environment": facts["environment"],
    }
    (results / "evaluation-gspn2-emoji.json").write_text(json.dumps(one))
    text = write_document(results, tmp_path / "docs" / "results.md").read_text()
    assert "| gspn2 | 18.00M | 0.1000 | 0.2040 | +2.0% |" in text
    assert "| softmax | 18.00M | 0.1000 | 0.2000 | +0.0% |" in text
    assert "Failed runs: linear." in text
    assert "| measure | gspn2 | softmax | real |" in text
    assert "| two things, both recognised and in place | 80.0% (70%-90%) | 95.0% | 50 |" in text
    assert "unseen pairs top1 75.0%" in text
    assert text.index("| gspn2 | 256x256 |") < text.index("| gspn2 | 384x384 |")
    assert "polyline" in (tmp_path / "docs" / "results-mixers.svg").read_text()


def test_steps_that_were_timed_alone_are_said_to_be(tmp_path):
    facts = study(tmp_path)
    for name, milliseconds in (("gspn2", 11.25), ("softmax", 17.5)):
        facts["variants"][name] |= {"step_milliseconds_alone": milliseconds, "step_pictures_alone": 64}
    (tmp_path / "ablations.json").write_text(json.dumps(facts))
    text = write_document(tmp_path, tmp_path / "results.md").read_text()
    assert "+0.0% | 17.5 |" in text
    assert "Steps (64 pictures, forward and backward, not compiled) were timed afterwards" in text


def test_steps_are_timed_for_every_model(monkeypatch):
    """Medians without the first rounds, which compile; the models take turns."""
    tiny = {**BASE, "num_layers": 1, "sample_size": 4}
    found = time_steps({"a": tiny, "b": {**tiny, "mixer": "softmax"}}, batch=1, device="cpu")
    assert set(found) == {"a", "b"}
    assert all(0 < value < 60_000 for value in found.values())

    clock, order = [0.0], []

    def make_step(seconds, batch, device):
        def step():
            order.append(seconds)
            clock[0] += seconds if len(order) > 4 else 10.0

        return step

    monkeypatch.setattr(step_time, "_make_step", make_step)
    monkeypatch.setattr(step_time.time, "perf_counter", lambda: clock[0])
    assert time_steps({"a": 0.25, "b": 0.5}, device="cpu") == {"a": 250.0, "b": 500.0}
    assert order[:4] == [0.25, 0.5, 0.25, 0.5]


def test_a_plot_without_points_is_still_a_picture():
    assert plot({"a": []}, "val_train").startswith("<svg")
    assert plot({"a": [{"pictures": 5, "val_train": 0.5}]}, "val_train").startswith("<svg")


def test_the_committed_document_is_the_one_that_the_files_give(tmp_path):
    (tmp_path / TRANSFER_SHEET).write_bytes(b"")  # shown where it is
    made = write_document(ROOT / "benchmarks" / "results", tmp_path / "results.md")
    assert made.read_text() == (ROOT / "docs" / "results.md").read_text()
