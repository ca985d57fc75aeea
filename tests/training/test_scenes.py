"""Scenes show what their captions say."""

import random
import re

import pytest
import tiny_training
import torch

from gspn2_diffusion.training.captions import (
    BACKGROUNDS,
    SceneOptions,
    SceneWriter,
    check_split,
)
from gspn2_diffusion.training.emoji import load_records, load_sprites, select
from gspn2_diffusion.training.prefetch import Prefetcher
from gspn2_diffusion.training.scene_clutter import clutter
from gspn2_diffusion.training.scenes import Layer, SceneBatch, compose

SIDE = 32


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    records = load_records(tiny_training.write_emoji(tmp_path_factory.mktemp("emoji")))
    return records, load_sprites(records, size=SIDE, workers=1)


@pytest.fixture(scope="module")
def training(emoji):
    records, sprites = emoji
    kept = [index for index, record in enumerate(records) if record.split == "train"]
    return [records[index] for index in kept], sprites[kept]


def drawn(training, seed, **options):
    records, sprites = training
    scenes = SceneWriter(records, SceneOptions(**options)).write(96, (seed,))
    return scenes, compose(sprites, scenes, SIDE)


def centre_of(picture, colour):
    """Mean (x, y) in -1..1 of the pixels that are nearly of the colour, or None."""
    wanted = torch.tensor(colour).view(3, 1, 1) / 127.5 - 1
    near = (picture - wanted).abs().amax(dim=0) < 0.08
    if int(near.sum()) < 4:
        return None
    rows, columns = torch.nonzero(near, as_tuple=True)
    return float(columns.float().mean()) / SIDE * 2 - 1, float(rows.float().mean()) / SIDE * 2 - 1


def named_things(caption):
    found = [(caption.find(name), name) for name in tiny_training.COLOURS if name in caption]
    return [name for _, name in sorted(found)]


def test_two_objects_stand_as_the_caption_says(training):
    scenes, pictures = drawn(training, 1, pair_probability=1.0, background_probability=0.0)
    relations = set()
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        names = named_things(caption)
        if len(names) < 2:
            continue  # the same thing twice: nothing to tell apart
        first, second = (centre_of(picture, tiny_training.COLOURS[name]) for name in names)
        assert first is not None, caption
        assert second is not None, caption
        if re.search(r"next to|beside", caption):
            continue  # either side
        word = re.search(r"left|right|above|over|below|under|top|and", caption).group()
        relations.add(word)
        axis, order = {"left": (0, 1), "and": (0, 1), "right": (0, -1)}.get(
            word, (1, -1 if word in ("below", "under") else 1)
        )
        assert order * (second[axis] - first[axis]) > 0.5, (caption, first, second)
    assert relations == {"left", "right", "above", "over", "below", "under", "top", "and"}


def test_background_is_the_named_colour_and_white_when_unnamed(training):
    scenes, pictures = drawn(training, 2, pair_probability=0.0)
    named = 0
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        shade = re.search(rf"({'|'.join(sorted(BACKGROUNDS, key=len, reverse=True))}) background", caption)
        corners = (picture[:, ::31, ::31] + 1).flatten(1).T * 127.5  # a large thing covers two at most
        if shade is None:
            assert [255.0, 255.0, 255.0] in corners.tolist(), caption
        else:
            named += 1
            wanted = torch.tensor(BACKGROUNDS[shade.group(1)]).float()
            assert float((corners - wanted).abs().amax(dim=1).min()) <= 12.0, caption
    assert 56 <= named <= 88


def test_caption_names_the_drawn_thing_and_its_style(emoji):
    records, sprites = emoji
    flat = [
        index for index, record in enumerate(records) if record.style == "flat" and record.split == "train"
    ]
    writer = SceneWriter([records[index] for index in flat], SceneOptions(0.0, 1.0, 0.0))
    scenes = writer.write(24, (3,))
    pictures = compose(sprites[flat], scenes, SIDE)
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        assert "flat style" in caption
        (name,) = named_things(caption)
        assert centre_of(picture, tiny_training.COLOURS[name]) is not None, caption


def test_seed_decides_everything(training):
    first, again, other = (drawn(training, seed) for seed in (5, 5, 6))
    assert first[0].captions == again[0].captions
    assert torch.equal(first[1], again[1])
    assert first[0].captions != other[0].captions


def test_compose_blends_straight_alpha_and_keeps_edges_clean():
    """A half-transparent red square whose hidden pixels are green: no green may show."""
    sprite = torch.zeros(1, 4, SIDE, SIDE, dtype=torch.uint8)
    sprite[:, 1] = 255
    sprite[:, :2, 8:24, 8:24] = torch.tensor([255, 0], dtype=torch.uint8).view(1, 2, 1, 1)
    sprite[:, 3, 8:24, 8:24] = 128
    layer = Layer(0, torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0.77]))
    picture = compose(sprite, SceneBatch(torch.zeros(1, 3, 1, 1), [layer]), SIDE)[0]
    assert picture[0, SIDE // 2, SIDE // 2].item() == pytest.approx(128 / 255 * 2 - 1, abs=1e-3)
    assert float(picture[1].max()) == -1.0
    assert float(picture[:, 0, 0].max()) == -1.0


def test_full_size_object_in_the_centre_is_the_sprite_itself():
    sprite = torch.randint(0, 256, (1, 4, SIDE, SIDE), dtype=torch.uint8)
    sprite[:, 3] = 255
    layer = Layer(0, torch.tensor([0]), torch.zeros(1, 2), torch.ones(1))
    picture = compose(sprite, SceneBatch(torch.ones(1, 3, 1, 1), [layer]), SIDE)
    torch.testing.assert_close(picture, sprite[:, :3].float() / 127.5 - 1, atol=2e-4, rtol=0)


def test_small_objects_are_averaged_not_picked():
    """A fine checkerboard shrunk to a quarter is gray; picking pixels would leave black and white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).to(torch.uint8)
    sprite = torch.stack([board, board, board, torch.full_like(board, 255)])[None]
    layer = Layer(0, torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0.5]), typical_size=0.5)
    picture = compose(sprite, SceneBatch(torch.ones(1, 3, 1, 1), [layer]), SIDE)
    inner = picture[0, :, 12:20, 12:20]
    assert float(inner.abs().max()) < 0.05


def test_held_out_records_never_reach_training(emoji):
    records, _ = emoji
    for split in ("unseen_pair", "unseen_concept"):
        held_out = select(records, split=split, groups=None)
        assert held_out
        with pytest.raises(ValueError, match=split):
            SceneWriter([*select(records, groups=None), *held_out], SceneOptions())
    with pytest.raises(ValueError, match="records"):
        check_split([], ("train",))


def test_clutter_repeats_and_fills_all_kinds():
    scenes, again = clutter(8, 5, 3, (1, 2)), clutter(8, 5, 3, (1, 2))
    assert torch.equal(scenes.background, again.background)
    assert [len(layer.sprite) for layer in scenes.layers] == [4, 4, 4, 4]
    sprites = torch.full((5, 4, SIDE, SIDE), 255, dtype=torch.uint8)
    pictures = compose(sprites, scenes, SIDE)
    assert pictures.shape == (8, 3, SIDE, SIDE)
    assert float(pictures.abs().max()) <= 1.0


def test_prefetcher_keeps_order_and_passes_errors_on():
    def make(number):
        if number == 5:
            raise RuntimeError("broken caption")
        return number, random.Random(number).random()

    prefetcher = Prefetcher(make, first=2, depth=2)
    assert [prefetcher.get()[0] for _ in range(3)] == [2, 3, 4]
    with pytest.raises(RuntimeError, match="broken caption"):
        prefetcher.get()
    prefetcher.close()
