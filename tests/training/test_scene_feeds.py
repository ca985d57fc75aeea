"""Picture shapes take turns the same way after a resume, and train in one run."""

import json

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from script_modules import load_script

from gspn2_diffusion.training.captions import SceneOptions, SceneWriter
from gspn2_diffusion.training.emoji import load_records, load_sprites, select
from gspn2_diffusion.training.scene_feeds import TurnFeed, own_step, parse_shape, schedule
from gspn2_diffusion.training.scenes import compose

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("shapes", "share"), [(1, 0.25), (2, 0.25), (3, 0.5), (2, 0.9)])
def test_shapes_get_about_their_share_and_squares_the_rest(shapes, share):
    turns = schedule(shapes, share)
    assert set(turns) == set(range(shapes + 1))
    assert all(turns.count(number) == 1 for number in range(1, shapes + 1))
    assert 1 - turns.count(0) / len(turns) == pytest.approx(min(share, shapes / (shapes + 1)), abs=0.1)


def test_squares_alone_and_wrong_settings():
    assert schedule(0, 0.25) == [0]
    with pytest.raises(ValueError, match="aspect_share"):
        schedule(2, 1.0)
    assert parse_shape("192x320") == (192, 320)
    with pytest.raises(ValueError, match="'192x321'"):
        parse_shape("192x321")


class CountingFeed:
    """Notes the steps that it was asked for."""

    def __init__(self, number, step):
        self.number, self.step, self.wait_seconds = number, step, 1.0

    def advance(self):
        self.step += 1

    def draw(self, count, generator):
        return self.number, self.step

    def close(self):
        self.number = None


def drawn(first, count, turns):
    feed = TurnFeed(lambda number, step, share: CountingFeed(number, step), turns, first)
    seen = []
    for _ in range(count):
        feed.advance()
        seen.append(feed.draw(1, None))
    return seen


def test_a_resumed_run_draws_what_the_first_would_have_drawn():
    turns = schedule(2, 0.25)
    whole = drawn(0, 40, turns)
    for start in (1, 3, 8, 17):
        assert drawn(start, 40 - start, turns) == whole[start:]
    assert own_step(turns, 0, 40) + own_step(turns, 1, 40) + own_step(turns, 2, 40) == 40


def test_a_writer_of_another_shape_writes_for_it(tmp_path):
    records = select(load_records(tiny_training.write_emoji(tmp_path)), "train")
    sprites = load_sprites(records, size=32, workers=1)
    square = SceneWriter(records, SceneOptions(pair_probability=1.0, background_probability=0.0))
    wide = square.of_shape((32, 64))
    pictures = compose(sprites, wide.write(8, (1,)), 32)
    assert pictures.shape == (8, 3, 32, 64)
    assert compose(sprites, square.write(8, (1,)), 32).shape == (8, 3, 32, 32)
    assert square.aspect == 1.0


def test_a_run_with_several_shapes_trains_and_resumes(tmp_path):
    tiny_training.write_emoji(tmp_path / "emoji")
    tiny_training.write_models(tmp_path / "models")
    tiny_training.write_prompts(tmp_path / "prompts.json")
    module = load_script("scripts/train_text_to_image.py")

    def train(name, **changes):
        settings = {"max_train_steps": 6, "save_pipeline": False, "sheet_prompts": "none", **changes}
        options = tiny_training.denoiser_options(tmp_path, tmp_path / name, **settings)
        module.main([*options, "--aspects", "16x32", "32x16", "--log_steps", "1", "--aspect_share", "0.5"])
        return tmp_path / name

    whole = train("whole", checkpoint_steps=3)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6
    assert torch.isfinite(torch.tensor(losses)).all()
    again = train("again", resume_from=whole / "checkpoint-3")
    one, other = (load_file(run / "transformer" / _WEIGHTS) for run in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
