"""What the pixel checks read is what was painted."""

import pytest
import torch

from gspn2_diffusion.evaluation import pixels
from gspn2_diffusion.evaluation.statistics import frechet_distance, frechet_interval, share
from gspn2_diffusion.training.captions import BACKGROUNDS

SIDE = 96


def painted(ground, *spots, side=SIDE):
    """A picture with squares: (row, column, half side, colour)."""
    picture = torch.tensor(ground).view(3, 1, 1).expand(3, side, side).clone() / 255
    for row, column, half, colour in spots:
        picture[:, row - half : row + half, column - half : column + half] = (
            torch.tensor(colour).view(3, 1, 1) / 255
        )
    return picture


RED, BLUE = (214.0, 20.0, 20.0), (30.0, 60.0, 215.0)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_every_background_is_read_back_through_noise(name):
    noise = 0.03 * torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    picture = (painted(BACKGROUNDS[name], (48, 48, 30, RED)) + noise).clamp(0, 1)
    assert pixels.background_word(picture) == name


def test_foreground_is_the_thing_without_specks():
    picture = painted((255.0, 255.0, 255.0), (40, 30, 20, BLUE))
    picture[:, 90, 90] = 0.0
    assert pixels.box(pixels.foreground(picture)) == (20, 60, 10, 50)
    assert pixels.box(pixels.foreground(painted((255.0, 255.0, 255.0)))) is None


def test_rows_and_columns_are_cut_between_the_things():
    row = painted((255.0, 255.0, 255.0), (48, 20, 14, RED), (40, 70, 22, BLUE))
    left, right = pixels.parts(pixels.foreground(row), "row", 2)
    assert pixels.box(left) == (34, 62, 6, 34)
    assert pixels.box(right) == (18, 62, 48, 92)
    column = row.transpose(1, 2)
    top, bottom = pixels.parts(pixels.foreground(column), "column", 2)
    assert pixels.box(top) == (6, 34, 34, 62)
    assert pixels.box(bottom) == (48, 92, 18, 62)
    (whole,) = pixels.parts(pixels.foreground(row), "single", 1)
    assert pixels.box(whole) == (18, 62, 6, 92)


def test_three_things_in_a_row():
    spots = [(48, 16, 10, RED), (48, 48, 10, BLUE), (48, 80, 10, RED)]
    pieces = pixels.parts(pixels.foreground(painted((255.0, 255.0, 255.0), *spots)), "row", 3)
    assert [pixels.box(piece)[2:] for piece in pieces] == [(6, 26), (38, 58), (70, 90)]


def test_a_crop_centres_the_thing_and_leaves_its_neighbour_out():
    picture = painted((255.0, 255.0, 255.0), (48, 20, 14, RED), (48, 70, 14, BLUE))
    left, _ = pixels.parts(pixels.foreground(picture), "row", 2)
    found = pixels.crop(picture, left, 48)
    assert found.shape == (3, 48, 48)
    assert float((found[:, 24, 24] * 255 - torch.tensor(RED)).abs().max()) < 2
    assert float((found[:, 2, 2] - 1).abs().max()) < 0.02
    assert float(found[2].sub(found[0]).max()) < 0.2  # nothing blue


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_things_are_counted_without_crumbs(count):
    spots = [(25, 25), (25, 70), (70, 25), (70, 70)][:count]
    picture = painted((255.0, 255.0, 255.0), *((row, column, 15, BLUE) for row, column in spots))
    picture[:, 46:50, 46:50] = 0.0
    mask = pixels.foreground(picture)
    assert pixels.count_things(mask) == count
    high, low, left, right = pixels.box(pixels.largest(mask))
    assert 26 <= low - high <= 34
    assert 26 <= right - left <= 34


def test_nothing_is_nothing():
    empty = pixels.foreground(painted((255.0, 255.0, 255.0)))
    assert pixels.count_things(empty) == 0
    assert not pixels.has_colour(painted((255.0, 255.0, 255.0)), empty, "red")
    assert pixels.crop(painted(BACKGROUNDS["teal"]), empty, 32).shape == (3, 32, 32)


def test_colours_of_things():
    picture = painted((255.0, 255.0, 255.0), (48, 48, 30, BLUE), (48, 48, 8, (250.0, 250.0, 250.0)))
    mask = pixels.foreground(picture)
    assert pixels.has_colour(picture, mask, "blue")
    assert not pixels.has_colour(picture, mask, "red")


def test_wilson_interval_of_a_known_share():
    found = share([True] * 8 + [False] * 2)
    assert found.value == pytest.approx(0.8)
    assert found.low == pytest.approx(0.4902, abs=2e-4)
    assert found.high == pytest.approx(0.9433, abs=2e-4)
    assert (share([]).low, share([]).high, share([]).count) == (0.0, 1.0, 0)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(20000, 3, generator=generator)
    assert frechet_distance(rows[::2], rows[1::2]) < 0.01
    moved = rows[1::2] * torch.tensor([2.0, 1.0, 1.0]) + torch.tensor([0.0, 3.0, 0.0])
    assert frechet_distance(rows[::2], moved) == pytest.approx(9.0 + 1.0, rel=0.05)
    value, low, high = frechet_interval(rows[:200], moved[:200], rounds=10)
    assert low < value < high
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(rows[:1], rows)
