"""The evaluation end to end: prompts, a judge that learns, scores that tell right from wrong, the script."""

import json
import math

import pytest
import tiny_models
import tiny_training
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from script_modules import load_script

from gspn2_diffusion.evaluation.judge import JudgeSize, load_judge
from gspn2_diffusion.evaluation.judge_training import JudgeTraining, judge_data, train_judge
from gspn2_diffusion.evaluation.pictures import RealPictures, as_tensor
from gspn2_diffusion.evaluation.prompts import GROUPS, SIZES, evaluation_prompts, fingerprint
from gspn2_diffusion.evaluation.scoring import score
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.training.emoji import load_records

SIDE = 64


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return load_records(tiny_training.write_emoji(tmp_path_factory.mktemp("emoji")))


@pytest.fixture(scope="module")
def prompts(records):
    return evaluation_prompts(records, limit=8)


@pytest.fixture(scope="module")
def judge(records, tmp_path_factory):
    """A tiny judge of the tiny data, as saved and loaded again."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    training = JudgeTraining(steps=40, seconds=math.inf, batch=24, rate=8e-3)
    made, measures = train_judge(
        judge_data(records), torch.device("cpu"), size=JudgeSize(8, 16, 32), training=training
    )
    made.save(folder, measures)
    return load_judge(folder, torch.device("cpu"))


def test_prompts_are_fixed_and_ask_for_what_they_are_about(records, prompts):
    assert fingerprint(prompts) == fingerprint(evaluation_prompts(records, limit=8))
    assert evaluation_prompts(records, limit=3)[0] == prompts[0]
    known = {record.id: record for record in records}
    for asked in prompts:
        assert asked.group in GROUPS
        assert f"{asked.style} style" in asked.prompt
        assert f"{asked.background} background" in asked.prompt
        wanted = asked.group if asked.group.startswith("unseen") else "train"
        assert {known[name].split for name in asked.records} == {wanted}
        if asked.group == "pair":
            first, second = (asked.prompt.find(known[name].name) for name in asked.records)
            swapped = "right of" in asked.prompt or "below" in asked.prompt
            assert (first > second) == swapped, asked.prompt
        if asked.group == "colour":
            assert asked.colour in asked.prompt
            assert asked.colour != asked.background
    assert {asked.group for asked in prompts} == set(GROUPS)
    assert len({asked.seed for asked in prompts}) == len(prompts)


def test_the_prompts_have_not_changed_without_a_new_version(prompts):
    """Scores of one version must stay comparable."""
    assert fingerprint(prompts) == "v1-5c52575b7a30"


def test_unknown_groups_are_named(records):
    with pytest.raises(ValueError, match=r"unknown groups \['pears'\]"):
        evaluation_prompts(records, {"pears": 3})


def test_the_judge_keeps_held_out_pictures_apart(records):
    data = judge_data(records)
    kept = {record.id for record in (*data.held_pairs, *data.held_concepts)}
    assert kept
    assert kept.isdisjoint(record.id for record in data.train)
    assert {record.split for record in data.held_pairs} == {"unseen_pair"}


def test_real_pictures_pass_and_wrong_ones_fail(records, prompts, judge):
    network, measures = judge
    assert measures["judge_steps"] == 40
    real = RealPictures(records, prompts, (SIDE, SIDE))
    found = score(network, prompts, real).shares()
    assert found["background"].value > 0.95
    assert found["count"].value == 1.0
    assert found["colour"].value >= 0.75
    assert found["relation/pair"].value == 1.0  # five of six concepts are always among the five likeliest
    assert found["concept_top1/seen"].value >= 0.6
    shuffled = [prompts[number - 1] for number in range(len(prompts))]
    wrong = score(network, shuffled, real).shares()
    assert wrong["background"].value < 0.6
    assert wrong["concept_top1/seen"].value < found["concept_top1/seen"].value


def test_swapped_things_fail_the_relation(records, judge):
    network, _ = judge
    prompts = [asked for asked in evaluation_prompts(records, {"pair": 12}) if asked.layout == "row"]
    real = RealPictures(records, prompts, (SIDE, SIDE))
    straight = score(network, prompts, real, likeliest=1).outcomes["relation/pair"]
    mirrored = score(network, prompts, lambda n: real(n).flip(-1), likeliest=1).outcomes["relation/pair"]
    assert sum(straight) > sum(mirrored)


def tiny_pipeline():
    vae = tiny_models.tiny_vae()
    return GSPN2Pipeline(
        tokenizer=tiny_models.tiny_tokenizer(),
        text_encoder=tiny_models.tiny_text_encoder(),
        vae=vae,
        transformer=tiny_models.tiny_transformer(in_channels=vae.config.latent_channels),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def script():
    return load_script("scripts/evaluate.py")


def test_the_script_measures_a_pipeline_folder(tmp_path, capsys):
    tiny_training.write_emoji(tmp_path / "emoji")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--data", tmp_path / "emoji", "--out", tmp_path / "out"]
    options += ["--limit", 2, "--steps", 1, "--judge_steps", 3, "--judge_width", 4, "--judge_batch", 8]
    options += ["--sizes", "16,16x32", "--device", "cpu", "--groups", "seen,pair,count,colour"]
    options += ["--judge_seconds", 1e9]
    options += ["--fid", "--fid_weights", tmp_path / "nowhere"]  # without a file they may be fetched
    script().main([str(option) for option in options])
    shown = capsys.readouterr().out
    assert "background" in shown
    for name, shape in (("", (16, 16)), ("-16x32", (16, 32))):  # 16 is the model's own size
        facts = json.loads((tmp_path / "out" / f"results{name}.json").read_text())
        assert (facts["settings"]["height"], facts["settings"]["width"]) == shape
        assert facts["prompts"] == {"seen": 2, "pair": 2, "count": 2, "colour": 2}
        assert facts["scores"]["background"]["count"] == 8
        assert facts["fid"] is None
        assert 0 <= facts["scores"]["background"]["low"] <= facts["scores"]["background"]["high"] <= 1
        assert "ceiling" in facts["scores"]["concept_top5/seen"]
        assert Image.open(tmp_path / "out" / f"sheet{name}.png").width > 200
    assert (tmp_path / "out" / "judge" / "judge.json").is_file()


def test_the_script_names_a_wrong_size(tmp_path):
    with pytest.raises(ValueError, match="256 or 192x320"):
        script().parse_size("12x3x4")
    assert script().parse_size("192x320") == (192, 320)


def test_all_sizes_are_of_known_groups():
    assert set(SIZES) == set(GROUPS)
    assert as_tensor(Image.new("RGB", (4, 6), (255, 0, 0)))[:, 0, 0].tolist() == [1.0, 0.0, 0.0]
