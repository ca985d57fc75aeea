"""Coloured, counted and placed things: what captions say is what pixels show."""

import random
import re

import pytest
import tiny_training
import torch

from gspn2_diffusion.training import scene_layouts
from gspn2_diffusion.training.captions import SceneOptions, SceneWriter
from gspn2_diffusion.training.emoji import load_records, load_sprites, select
from gspn2_diffusion.training.emoji_captions import plural, without_colour
from gspn2_diffusion.training.emoji_curation import is_curated, is_lettered
from gspn2_diffusion.training.scene_colours import (
    OBJECT_COLOURS,
    from_hsv,
    main_colours,
    recolour,
    tint,
    to_hsv,
)
from gspn2_diffusion.training.scenes import compose

SIDE = 64


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    records = select(load_records(tiny_training.write_emoji(tmp_path_factory.mktemp("emoji"))), "train")
    sprites = load_sprites(records, size=32, workers=1)
    return records, sprites, main_colours(sprites)


def drawn(training, count, **options):
    records, sprites, colours = training
    options = {"pair_probability": 0.0, "style_probability": 0.0, "background_probability": 0.0} | options
    scenes = SceneWriter(records, SceneOptions(**options), colours=colours).write(count, (7,))
    return scenes, compose(sprites, scenes, SIDE)


def blobs(picture):
    """Connected parts of a picture that are not its white background: [(pixels, row, column)]."""
    left = {(int(y), int(x)) for y, x in torch.nonzero(picture.amin(dim=0) < 0.6)}
    found = []
    while left:
        stack, part = [left.pop()], []
        while stack:
            y, x = stack.pop()
            part.append((y, x))
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            stack += near
        if len(part) > 20:
            found.append(
                (len(part), sum(y for y, _ in part) / len(part), sum(x for _, x in part) / len(part))
            )
    return found


def test_colours_survive_the_way_there_and_back():
    colour = torch.rand(4, 3, 9, 7, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(from_hsv(to_hsv(colour)), colour, atol=1e-5)


def test_main_colours_are_found_and_named(training):
    records, _, colours = training
    names = {record.name: main.name for record, main in zip(records, colours, strict=True)}
    assert names["red apple"] == "red"
    assert names["blue car"] == "blue"
    assert names["green frog"] == "green"
    assert all(main.share > 0.9 for main in colours)


@pytest.mark.parametrize("colour", OBJECT_COLOURS)
def test_recoloured_sprites_have_the_asked_colour(training, colour):
    _, sprites, colours = training
    pixels = sprites[:, :3].float() / 255
    found = recolour(pixels, torch.tensor([tint(main, colour) for main in colours]))
    hue, saturation, value = OBJECT_COLOURS[colour]
    wanted = from_hsv(torch.tensor([hue, saturation, value]).view(1, 3, 1, 1))
    assert float((found[:, :, 16, 16] - wanted[..., 0, 0]).abs().max()) < 0.12


def test_sprites_without_a_main_colour_are_not_recoloured():
    stripes = torch.zeros(1, 4, 32, 32, dtype=torch.uint8)
    stripes[:, 3] = 255
    for band, channels in enumerate(((0,), (1,), (2,), ())):
        for channel in channels:
            stripes[:, channel, band * 8 : band * 8 + 8] = 220
    (main,) = main_colours(stripes)
    assert main.kind == 0
    assert main.name is None
    with pytest.raises(ValueError, match="no main colour"):
        tint(main, "red")


def test_captions_name_the_colour_that_is_drawn(training):
    scenes, pictures = drawn(training, 40, colour_probability=1.0)
    words = set()
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        word, thing = re.fullmatch(r"an? (\w+) (apple|car|frog|star|ghost)", caption).groups()
        words.add(word)
        wanted = from_hsv(torch.tensor(OBJECT_COLOURS[word]).view(1, 3, 1, 1)).flatten()
        assert float(((picture[:, 32, 32] + 1) / 2 - wanted).abs().max()) < 0.12, (caption, thing)
    assert len(words) >= 8


def test_recoloured_things_stand_out_from_their_background(training):
    scenes, _ = drawn(training, 200, colour_probability=1.0, background_probability=1.0)
    for caption in scenes.captions:
        colour = re.match(r"an? (\w+) ", caption).group(1)
        ground = re.search(r"(\w+) background", caption).group(1)
        assert colour != ground, caption


def test_groups_show_as_many_things_as_the_caption_counts(training):
    scenes, pictures = drawn(training, 30, group_probability=1.0)
    seen = set()
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        number = {word: count for count, word in scene_layouts.COUNT_WORDS.items()}[caption.split()[0]]
        found = blobs(picture)
        assert len(found) == number, (caption, found)
        assert max(size for size, _, _ in found) < 1.6 * min(size for size, _, _ in found)
        seen.add(number)
    assert seen == {2, 3, 4}


def test_three_things_and_corners_stand_where_the_caption_says(training):
    scenes, pictures = drawn(training, 24, triple_probability=0.5, corner_probability=0.5)
    counts = {"corner": 0, "triple": 0}
    for caption, picture in zip(scenes.captions, pictures, strict=True):
        found = blobs(picture)
        if len(found) == 1:
            counts["corner"] += 1
            ((_, row, column),) = found
            for word, inside in (
                ("left", column < SIDE / 2),
                ("right", column > SIDE / 2),
                ("top", row < SIDE / 2),
                ("bottom", row > SIDE / 2),
            ):
                assert word not in caption or inside, (caption, found)
        else:
            counts["triple"] += 1
            assert len(found) == 3, (caption, found)
            if "in the middle" in caption and "left" in caption:
                assert max(row for _, row, _ in found) - min(row for _, row, _ in found) < SIDE / 3
    assert counts["corner"] >= 6
    assert counts["triple"] >= 6


def test_things_stay_in_their_cells_at_every_aspect():
    rng = random.Random(5)
    every = [*scene_layouts.PAIRS, *scene_layouts.TRIPLES, *scene_layouts.CORNERS]
    for aspect in (1.0, 320 / 192, 192 / 320):
        for arrangement in every:
            for cell in arrangement.cells:
                x, y, size = scene_layouts.place(rng, cell, aspect)
                across, down = size / max(aspect, 1.0), size / max(1 / aspect, 1.0)
                assert abs(x - cell.x) + across <= cell.wide + 1e-6
                assert abs(y - cell.y) + down <= cell.high + 1e-6


def test_wide_scenes_keep_their_things_square(training):
    records, sprites, colours = training
    writer = SceneWriter(records, SceneOptions(0.0, 0.0, 0.0), colours=colours, aspect=2.0)
    pictures = compose(sprites, writer.write(6, (3,)), (SIDE, 2 * SIDE))
    assert pictures.shape == (6, 3, SIDE, 2 * SIDE)
    for picture in pictures:
        rows, columns = torch.nonzero(picture.amin(dim=0) < 0.6, as_tuple=True)
        high, wide = int(rows.max() - rows.min()), int(columns.max() - columns.min())
        assert abs(high - wide) <= 3


def test_turned_and_mirrored_sprites(training):
    _, sprites, _ = training
    scenes, _ = drawn(training, 64, wobble=0.1, mirror_probability=0.5)
    pose = scenes.layers[0].pose
    assert float(pose[:, 0].abs().max()) <= 0.1
    assert 16 <= int((pose[:, 1] < 0).sum()) <= 48
    layer = scenes.layers[0]
    marked = torch.zeros_like(sprites[:1])
    marked[:, 3, :, :16] = 255  # the left half alone is there
    layer.sprite.zero_()
    layer.size.fill_(0.8)
    layer.centre.zero_()
    layer.tinted = None
    pictures = compose(marked, scenes, SIDE)
    for row, picture in zip(pose, pictures, strict=True):
        _, columns = torch.nonzero(picture.amin(dim=0) < 0.0, as_tuple=True)
        assert (float(columns.float().mean()) > SIDE / 2) == bool(row[1] < 0)


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("red apple", "red apples"),
        ("cup of coffee", "cups of coffee"),
        ("strawberry", "strawberries"),
        ("mouse face", "mouse faces"),
        ("mouse", "mice"),
        ("face with tears", "faces with tears"),
        ("fox", "foxes"),
        ("grapes", None),
        ("bread", None),
        ("mount fuji", None),
    ],
)
def test_plurals(words, several):
    assert plural(words) == several


def test_colour_words_make_room():
    assert without_colour("red apple") == "apple"
    assert without_colour("orange") == "orange"
    assert without_colour("black hole") == "black hole"


def test_curation_and_letters(training):
    from dataclasses import replace

    record = training[0][0]
    named = {
        name: replace(record, name=name) for name in ("three o'clock", "alarm clock", "red apple", "fox")
    }
    assert [is_curated(named[name]) for name in named] == [False, True, True, True]
    assert [is_lettered(named[name]) for name in named] == [True, True, False, False]
