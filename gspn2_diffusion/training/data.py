"""The training pictures of a run: records of one split and their sprites, drawn once per host."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gspn2_diffusion.training.captions import check_split
from gspn2_diffusion.training.config import RunConfig
from gspn2_diffusion.training.emoji import DEFAULT_GROUPS, EmojiRecord, load_records, load_sprites, select
from gspn2_diffusion.training.emoji_curation import curated
from gspn2_diffusion.training.runtime import Run

if TYPE_CHECKING:
    from torch import Tensor


def split_records(
    config: RunConfig, split: str, groups: Sequence[str] | None = None, styles: Sequence[str] | None = None
) -> list[EmojiRecord]:
    """Records of a split; `groups` None takes the default groups and ("all",) every group.

    Raises:
        ValueError: nothing is left, or a group or style is unknown.
    """
    wanted = None if groups is not None and list(groups) == ["all"] else groups or DEFAULT_GROUPS
    records = select(load_records(config.data), split=split, groups=wanted, styles=styles)
    if getattr(config, "curated", False):
        records = curated(records)
    if config.data_fraction < 1.0:
        count = max(2, round(len(records) * config.data_fraction))
        records = random.Random(0).sample(records, min(count, len(records)))
    check_split(records, (split,))
    return records


def sprites_for(run: Run, records: Sequence[EmojiRecord]) -> Tensor:
    """uint8 (S, 4, side, side) on the run's device; with a cache, one process draws and the others read."""
    config = run.config
    with run.accelerator.local_main_process_first():
        sprites = load_sprites(
            records, size=config.sprite_size, cache_dir=config.sprite_cache, errors="blank"
        )
    return sprites.to(run.device)
