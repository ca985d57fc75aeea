"""Pictures of the prompts: drawn by a pipeline, or composed from real sprites for the judges' ceiling."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gspn2_diffusion.evaluation.prompts import AskedPrompt
from gspn2_diffusion.training.captions import BACKGROUNDS
from gspn2_diffusion.training.emoji import EmojiRecord, load_sprites
from gspn2_diffusion.training.scene_colours import main_colours, tint
from gspn2_diffusion.training.scene_layouts import GROUPS, Cell, column, place, row
from gspn2_diffusion.training.scenes import Layer, SceneBatch, compose


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Any text-to-image pipeline folder, or the name of an embedded model, without its progress bar."""
    folder = Path(model)
    index = folder / "model_index.json"
    if index.is_file() and '"GSPN2Pipeline"' not in index.read_text(encoding="utf-8"):
        from diffusers import DiffusionPipeline

        pipeline: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype)
    else:
        from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

        pipeline = GSPN2Pipeline.from_pretrained(model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def own_settings(pipeline: Any, steps: int | None, guidance: float | None) -> dict[str, Any]:
    """Steps and guidance that pictures are drawn with: what is given, else the model's own."""
    from gspn2_diffusion.pipelines.model_folders import own_sampling

    few_steps = getattr(pipeline, "few_steps_enabled", False)
    found = own_sampling(pipeline.config, steps, guidance, few_steps)
    return dict(zip(("steps", "guidance"), found, strict=True))


def generate(
    pipeline: Any,
    prompts: Sequence[AskedPrompt],
    *,
    steps: int | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    batch: int,
    say: Callable[[str], None] = print,
) -> list[Image.Image]:
    """One picture per prompt, from the prompt's own seed, so that the batch size changes none of them.

    Args:
        pipeline: a text-to-image pipeline.
        prompts: what is asked for.
        steps: denoising steps; None for the model's own.
        guidance: guidance scale; None for the model's own.
        size: (height, width), or None for the pipeline's own.
        batch: pictures drawn at once.
        say: gets a line now and then.
    """
    shape = {} if size is None else {"height": size[0], "width": size[1]}
    settings = own_settings(pipeline, steps, guidance)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pictures += pipeline(
            prompt=[asked.prompt for asked in part],
            generator=[torch.Generator("cpu").manual_seed(asked.seed) for asked in part],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            output_type="pil",
            **shape,
        ).images
        if start and start % (batch * 4) == 0:
            say(f"{start + len(part)} of {len(prompts)} pictures")
    return pictures


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in 0..1."""
    array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


class RealPictures:
    """The prompts' pictures composed from the real sprites: what a perfect generator would draw.

    Args:
        records: every record of the data.
        prompts: what is asked for.
        resolution: (height, width) in pixels.
        cache_dir: folder for the drawn sprites.
    """

    def __init__(
        self,
        records: Sequence[EmojiRecord],
        prompts: Sequence[AskedPrompt],
        resolution: tuple[int, int],
        cache_dir: str | None = None,
    ) -> None:
        wanted = sorted({name for asked in prompts for name in asked.records})
        known = {record.id: record for record in records}
        self._row = {name: number for number, name in enumerate(wanted)}
        chosen = [known[name] for name in wanted]
        side = min(256, max(32, min(resolution)))
        self._sprites = load_sprites(chosen, size=side, cache_dir=cache_dir, errors="blank")
        self._prompts, self._resolution = prompts, resolution

    def __call__(self, number: int) -> Tensor:
        """(3, H, W) in 0..1 of a prompt."""
        asked = self._prompts[number]
        rng = random.Random(f"real-{asked.seed}")
        aspect = self._resolution[1] / self._resolution[0]
        names = asked.records * (asked.count if asked.layout == "group" else 1)
        layers = []
        for name, cell in zip(names, _cells(asked), strict=True):
            fill = (0.74, 0.94) if asked.layout == "single" else (0.84, 0.94)
            x, y, size = place(rng, cell, aspect, fill)
            sprite = torch.tensor([self._row[name]])
            layer = Layer(0, sprite, torch.tensor([[x, y]]), torch.tensor([size]), size)
            layers.append(self._tinted(layer, asked))
        ground = torch.tensor(BACKGROUNDS[asked.background], dtype=torch.float32).view(1, 3, 1, 1) / 255
        return (compose(self._sprites, SceneBatch(ground, layers), self._resolution)[0] + 1) / 2

    def _tinted(self, layer: Layer, asked: AskedPrompt) -> Layer:
        """The layer in the asked colour, where the sprite has a main colour that can be changed."""
        if asked.colour is not None:
            (main,) = main_colours(self._sprites[layer.sprite])
            if main.kind:
                layer.tinted = torch.tensor([0])
                layer.tints = torch.tensor([tint(main, asked.colour)])
        return layer


def _cells(asked: AskedPrompt) -> Sequence[Cell]:
    if asked.layout == "group":
        return GROUPS[asked.count][0].cells
    if asked.layout == "single":
        return [Cell(0.0, 0.0, 1.0, 1.0)]
    return row(asked.count) if asked.layout == "row" else column(asked.count)
