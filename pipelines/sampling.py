"""Small calculations of the sampling loop, apart from any pipeline."""

from __future__ import annotations

from typing import Any

import torch

from gspn2_diffusion.pipelines.text_encoding import pad_tokens

# The loop's tensors by their argument names: latents, prompt_embeds, ...; None where a call has none.
Tensors = dict[str, Any]


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent along one side, for any of diffusers' image autoencoders; 8 without one."""
    if vae is None:
        return 8
    ratio = getattr(vae, "spatial_compression_ratio", None)
    if ratio is not None:
        return int(ratio)
    stages = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(stages) - 1))


def dynamic_shift_mu(config: Any, tokens: int) -> float:
    """The scheduler's resolution-dependent shift: linear in the number of tokens, as in SD3."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(base + (top - base) * (tokens - low) / (high - low))


def conditioning(tensors: Tensors, guided: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, mask and pooled vector for one denoiser call; with guidance the negative half comes first.

    Raises:
        ValueError: guidance was switched on during a call that started without it.
    """
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    embeds, mask, pooled = (tensors[name] for name in names)
    if not guided:
        return embeds, mask, pooled
    negative = [tensors[name.replace("prompt", "negative_prompt", 1)] for name in names[:2]]
    if negative[0] is None:
        raise ValueError("a callback raised `guidance_scale` above 1 in a call that started without guidance")
    length = max(embeds.shape[1], negative[0].shape[1])
    embeds, mask = pad_tokens(embeds, mask, length)
    negative_embeds, negative_mask = pad_tokens(negative[0], negative[1], length)
    return (
        torch.cat([negative_embeds, embeds]),
        torch.cat([negative_mask, mask.to(negative_mask.dtype)]),
        torch.cat([tensors["negative_pooled_prompt_embeds"], pooled]),
    )
