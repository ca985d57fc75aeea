"""What ``training.py`` trains: denoisers with random weights, and batches of random rows out of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.training.config import read_mapping
from gspn2_diffusion.training.latents import LatentBatch
from gspn2_diffusion.training.picture_cache import Entry
from gspn2_diffusion.training.picture_feed import BatchPlan, PictureFeed
from gspn2_diffusion.training.rows import RowStore
from gspn2_diffusion.training.runtime import Run
from gspn2_diffusion.training.text import TextStates

ROOT = Path(__file__).parents[1]
PIXELS_PER_TOKEN_SIDE = 16  # f8 latents, patch 2
PIXELS = (512, 2048, 256, 1024)  # the two that acceptance asks for come first
TOKENS_IN_BATCH = {"embedded": 2**17, "0.6b": 2**14, "tiny": 64}
TEXT_TOKENS = {"embedded": 32, "0.6b": 300, "tiny": 8}


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    pixels: int
    mixer: str
    compiled: bool

    @property
    def tokens(self) -> int:
        """Picture tokens."""
        return (self.pixels // PIXELS_PER_TOKEN_SIDE) ** 2


class CachedRows:
    """A source of batches out of a cache that holds random rows; see `training.sources.LatentSource`."""

    def __init__(self, run: Run, folder: Path, model: Any, cell: Cell, batch_size: int) -> None:
        side = cell.pixels // PIXELS_PER_TOKEN_SIDE * model.config.patch_size
        self._shape = (model.config.in_channels, side, side)
        self._text = (TEXT_TOKENS[cell.model], model.config.caption_channels)
        self._pooled = model.config.pooled_projection_dim
        half = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        latents, texts = RowStore(folder / "latents"), RowStore(folder / "text")
        entries = self._fill(latents, texts, max(batch_size * 2, 16), half, run.rank)
        self.prompts: list[str] = []
        self._empty = TextStates(
            torch.zeros(1, *self._text, dtype=half, device=run.device),
            torch.ones(1, self._text[0], dtype=torch.bool, device=run.device),
            torch.zeros(1, self._pooled or 1, dtype=half, device=run.device),
        )
        plan = BatchPlan(entries, [self._shape] * len(entries), batch_size, run.rank)
        self._feed = PictureFeed(plan, latents, texts, first=0, stride=1, device=run.device, depth=8)
        self.vae = None

    def _fill(
        self, latents: RowStore, texts: RowStore, count: int, half: torch.dtype, rank: int
    ) -> list[Entry]:
        keys = [f"{rank}-{number}" for number in range(count)]
        length, width = self._text
        for key in keys:
            latents.add(key, {"latents": torch.randn(self._shape).half()})
            row = {"hidden": torch.randn(length, width).to(half), "mask": torch.ones(length).bool()}
            texts.add(key, row | {"pooled": torch.randn(self._pooled or 1).to(half)})
        for store in (latents, texts):
            store.flush()
            store.reload()
        return [Entry(key, key, (key,), ("",)) for key in keys]

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for batches."""
        return self._feed.wait_seconds

    def empty(self, device: torch.device) -> TextStates:
        """The dropped caption."""
        return self._empty

    def draw(self, micro: int, generator: torch.Generator) -> LatentBatch:
        """The next batch."""
        return self._feed.next()

    def fixed_sets(self) -> list[Any]:
        """None: nothing is validated here."""
        return []

    def describe(self, step: int) -> str:
        """For error messages."""
        return "random rows"

    def close(self) -> None:
        """End the thread."""
        self._feed.close()


def build_model(cell: Cell) -> Any:
    """The denoiser of a cell with random weights; GSPN-2 and softmax differ in the mixer alone."""
    if cell.model == "tiny":
        return GSPN2Transformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_channels=16, mixer=cell.mixer
        )
    name = {"embedded": "gspn2-emoji", "0.6b": "gspn2-0.6b"}[cell.model]
    shape = read_mapping(ROOT / "configs" / f"{name}-transformer.json")
    return GSPN2Transformer2DModel.from_config({**shape, "mixer": cell.mixer})
