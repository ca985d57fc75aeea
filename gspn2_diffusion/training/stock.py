"""Frozen parts of diffusers' own pipelines (SD-1.5, SDXL, PixArt, Sana), called as each pipeline does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn2_diffusion.training.config import ConfigError
from gspn2_diffusion.training.frozen import FrozenModels
from gspn2_diffusion.training.text import TextStates


class StockModels(FrozenModels):
    """Autoencoder and text encoders of a pipeline of diffusers, and what its denoiser wants beside latents.

    Args:
        pipeline: without its denoiser, on its device.
        denoiser: of the family whose conditions are made.
        max_text_tokens: where the family leaves a choice (PixArt, Sana).
    """

    def __init__(self, pipeline: Any, denoiser: Any, max_text_tokens: int) -> None:
        super().__init__(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, max_text_tokens)
        self.pipeline = pipeline
        self.component = "unet" if hasattr(pipeline, "unet") else "transformer"
        self._config = denoiser.config
        self.family = _family(denoiser)
        second = getattr(pipeline, "text_encoder_2", None)
        if second is not None:
            second.eval().requires_grad_(False)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Of the pipeline's scheduler."""
        return dict(self.pipeline.scheduler.config)

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: "flow", "epsilon" or "v_prediction"."""
        if self.family == "sana" or "beta_start" not in self.scheduler_config:
            return "flow"
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def multiple(self) -> int:
        """Pixels that every side must be a multiple of."""
        stages = self._config.get("down_block_types")
        steps = 2 ** (len(stages) - 1) if stages else int(self._config.get("patch_size") or 1)
        return self.vae_scale * steps

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> TextStates:
        """What the pipeline's ``encode_prompt`` makes of captions."""
        device = self.text_encoder.device
        shared = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        length: dict[str, Any] = {"max_sequence_length": self.max_text_tokens, "clean_caption": False}
        mask = pooled = None
        if self.family == "sdxl":
            hidden, _, pooled, _ = self.pipeline.encode_prompt(prompt=list(captions), **shared)
        elif self.family == "sd":
            hidden = self.pipeline.encode_prompt(prompt=list(captions), **shared)[0]
        elif self.family == "pixart":
            hidden, mask = self.pipeline.encode_prompt(prompt=list(captions), **shared, **length)[:2]
        else:
            length["complex_human_instruction"] = None  # captions are trained as they are
            hidden, mask = self.pipeline.encode_prompt(prompt=list(captions), **shared, **length)[:2]
        if mask is None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device)
        pooled = hidden.new_zeros(len(hidden), 1) if pooled is None else pooled
        return TextStates(hidden, mask.bool(), pooled)

    def conditions(self, text: TextStates, latents: Tensor) -> dict[str, Any]:
        """The denoiser's keyword arguments for a batch."""
        found: dict[str, Any] = {"encoder_hidden_states": text.hidden}
        if self.family in ("pixart", "sana"):
            found["encoder_attention_mask"] = text.mask.to(text.hidden.dtype)
        sides = [side * self.vae_scale for side in latents.shape[-2:]]
        if self.family == "sdxl":
            place = [*sides, 0, 0, *sides]  # original size, corner of the crop, size
            ids = torch.tensor(place, device=latents.device, dtype=text.hidden.dtype).expand(len(latents), -1)
            found["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": ids}
        elif self.family == "pixart":
            found["added_cond_kwargs"] = self._micro_conditions(sides, latents)
        return found

    def _micro_conditions(self, sides: list[int], latents: Tensor) -> dict[str, Tensor | None]:
        """Size and aspect ratio, for those PixArt models that were trained with them."""
        wanted = self._config.get("use_additional_conditions")
        if wanted is None:
            wanted = self._config.get("sample_size") == 128
        if not wanted:
            return {"resolution": None, "aspect_ratio": None}
        rows, device = len(latents), latents.device
        size = torch.tensor([float(side) for side in sides], device=device).expand(rows, -1)
        ratio = torch.full((rows, 1), sides[0] / sides[1], device=device)
        return {"resolution": size, "aspect_ratio": ratio}

    def with_denoiser(self, denoiser: Any) -> Any:
        """The whole pipeline around a denoiser."""
        parts = {**self.pipeline.components, self.component: denoiser}
        extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
        made = type(self.pipeline)(**parts, **extra)
        made.set_progress_bar_config(disable=True)
        return made


def _family(denoiser: Any) -> str:
    """ "sd", "sdxl", "pixart" or "sana".

    Raises:
        ConfigError: another denoiser, whose conditions are not known.
    """
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    if "UNet2DConditionModel" in names:
        kind = denoiser.config.get("addition_embed_type")
        if kind not in (None, "text_time"):
            raise ConfigError(f"`teacher`: a UNet with addition_embed_type={kind!r} is not supported")
        return "sdxl" if kind == "text_time" else "sd"
    for family, name in (("pixart", "PixArtTransformer2DModel"), ("sana", "SanaTransformer2DModel")):
        if name in names:
            return family
    raise ConfigError(
        f"`teacher` is a {names[0]}; allowed: GSPN2Transformer2DModel, UNet2DConditionModel (SD-1.5, SDXL), "
        "PixArtTransformer2DModel, SanaTransformer2DModel"
    )


def load_stock(folder: Path, denoiser: Any, dtype: torch.dtype, max_text_tokens: int) -> StockModels:
    """The frozen parts of a pipeline folder of diffusers.

    Raises:
        ConfigError: the folder is no pipeline, or of a family that is not supported.
    """
    from diffusers import DiffusionPipeline

    index = folder / "model_index.json"
    if not index.is_file():
        raise ConfigError(f"`pretrained`: {folder} is no pipeline folder, model_index.json is missing")
    _family(denoiser)
    known = json.loads(index.read_text(encoding="utf-8"))
    left_out = {name: None for name in ("unet", "transformer", "safety_checker") if name in known}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True, **left_out)
    return StockModels(pipeline.to(denoiser.device), denoiser, max_text_tokens)
