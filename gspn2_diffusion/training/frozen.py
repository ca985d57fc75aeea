"""The frozen parts of a denoiser's training: pictures to latents, captions to text states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn2_diffusion.pipelines.sampling import vae_scale_factor
from gspn2_diffusion.pipelines.text_encoding import encode_texts, masked_mean
from gspn2_diffusion.training.text import TextStates


class FrozenModels:
    """Autoencoder and text encoder as the sampling pipeline uses them.

    Args:
        vae: any autoencoder that the pipeline takes, on its device, in the type it shall run in.
        text_encoder: any encoder that returns ``last_hidden_state``, likewise.
        tokenizer: its tokenizer.
        max_text_tokens: length of the token rows.
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, max_text_tokens: int) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens
        self.vae_scale = vae_scale_factor(vae)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Pictures ``(B, 3, H, W)`` in -1..1 to normalised latents ``(B, C, h, w)`` float32.

        Of an autoencoder with a posterior its mode is taken.
        """
        config = self.vae.config
        output = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            raw = posterior.mode()
        else:
            raw = output.latent if hasattr(output, "latent") else output.latents
        shift = float(config.get("shift_factor") or 0.0)
        return (raw.float() - shift) * float(config.get("scaling_factor") or 1.0)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> TextStates:
        """What `GSPN2Pipeline.encode_prompt` makes of captions."""
        device = next(self.text_encoder.parameters()).device
        hidden, mask = encode_texts(
            list(captions), self.tokenizer, self.text_encoder, self.max_text_tokens, device
        )
        return TextStates(hidden, mask.bool(), masked_mean(hidden, mask))

    def empty(self, device: torch.device) -> TextStates:
        """The encoded empty caption, batch of one."""
        found = self.texts([""])
        return TextStates(found.hidden.to(device), found.mask.to(device), found.pooled.to(device))


def load_vae(folder: Path, dtype: torch.dtype) -> Any:
    """The autoencoder of a diffusers folder, of the class that its configuration names.

    Raises:
        ValueError: a class that the pipeline does not take.
    """
    import diffusers

    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    allowed = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
    if name not in allowed:
        raise ValueError(f"`vae`: {folder} is a {name}; allowed: {', '.join(allowed)}")
    return getattr(diffusers, name).from_pretrained(folder, dtype=dtype, use_safetensors=True)


def load_text_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The text encoder of a folder: the encoder half of T5, or the whole of any other model."""
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    name = {"bert": "BertModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}.get(kind, "AutoModel")
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype, use_safetensors=True)
