"""From a run's settings to its scene writer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspn2_diffusion.training.captions import SceneOptions, SceneWriter
from gspn2_diffusion.training.scene_colours import main_colours

if TYPE_CHECKING:
    from torch import Tensor

    from gspn2_diffusion.training.config import DenoiserConfig
    from gspn2_diffusion.training.emoji import EmojiRecord


def scene_options(config: DenoiserConfig) -> SceneOptions:
    """The scene frequencies of a run."""
    return SceneOptions(
        pair_probability=config.pair_probability,
        style_probability=config.style_probability,
        background_probability=config.background_probability,
        triple_probability=config.triple_probability,
        group_probability=config.group_probability,
        corner_probability=config.corner_probability,
        colour_probability=config.colour_probability,
        natural_probability=config.natural_probability,
        mirror_probability=config.mirror_probability,
        wobble=config.wobble,
    )


def scene_writer(
    config: DenoiserConfig,
    records: Sequence[EmojiRecord],
    sprites: Tensor,
    splits: Sequence[str] = ("train",),
) -> SceneWriter:
    """Writer of a run's scenes; looks at the sprites' colours only where captions name any."""
    coloured = config.colour_probability > 0 or config.natural_probability > 0
    colours = main_colours(sprites) if coloured else None
    return SceneWriter(records, scene_options(config), splits, colours)
