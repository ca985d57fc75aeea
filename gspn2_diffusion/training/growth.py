"""Larger models that start as smaller trained ones: more latent channels, more attention to the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gspn2_diffusion.models.caption_refiner import start_as_identity

# What a grown denoiser may differ in; everything else must be as it was.
GROWABLE = (
    "in_channels",
    "out_channels",
    "num_cross_attention_heads",
    "cross_attention_inner_dim",
    "num_caption_layers",
)
_NEW_LOGVAR = -12.0  # of new latent channels: hardly any noise, like that of trained ones


class GrowthError(ValueError):
    """The trained model cannot be grown into the wanted one."""


@torch.no_grad()
def grow_denoiser(source: Any, target: Any) -> Any:
    """Copy a trained denoiser into a larger one that computes the same at first.

    New latent channels are neither read nor written yet, new cross-attention heads and caption layers add
    nothing yet; all get gradients from the first step on.

    Args:
        source: trained ``GSPN2Transformer2DModel``.
        target: fresh one, as it is or larger in what `GROWABLE` names; filled in place.

    Returns:
        `target`.

    Raises:
        GrowthError: the models differ elsewhere, or the target is smaller.
    """
    keys = {*source.config, *target.config} - {"sample_size", "_name_or_path", "_diffusers_version"}
    differing = {k for k in keys if not k.startswith("_") and source.config.get(k) != target.config.get(k)}
    if not differing <= set(GROWABLE):
        raise GrowthError(f"the models differ in {sorted(differing - set(GROWABLE))}; allowed: {GROWABLE}")
    pixels = source.config.patch_size**2
    for layer in target.caption_layers[len(source.caption_layers) :]:
        start_as_identity(layer)
    old, new = source.state_dict(), target.state_dict()
    if not old.keys() <= new.keys():
        raise GrowthError(f"the wanted model is smaller: it lacks {min(old.keys() - new.keys())}")
    for name, value in new.items():
        if name not in old:
            continue
        known = old[name].to(value.dtype)
        if known.shape == value.shape:
            value.copy_(known)
        elif any(a > b for a, b in zip(known.shape, value.shape, strict=True)):
            raise GrowthError(f"{name} is {tuple(known.shape)}; the wanted model is smaller")
        elif name.startswith(("patch_embed", "proj_out")):
            _spread(value, known, pixels, 1 if name.startswith("patch_embed") else 0)
        else:
            _fill_heads(name, value, known)
    target.load_state_dict(new)
    return target


def _spread(value: Tensor, known: Tensor, pixels: int, dim: int) -> None:
    """Token features are ordered (pixel, channel): old channels first in every pixel, new ones zero."""
    value.zero_()
    inside, wanted = (x.unflatten(dim, (pixels, -1)) for x in (known, value))
    wanted.narrow(dim + 1, 0, inside.shape[dim + 1]).copy_(inside)


def _fill_heads(name: str, value: Tensor, known: Tensor) -> None:
    """Queries, keys and values of new heads stay random; what they add starts at zero."""
    if ".cross_attn.to_out" in name or ".attn.to_out" in name:
        value.zero_()
    value[tuple(slice(0, size) for size in known.shape)] = known


@torch.no_grad()
def grow_autoencoder(source: Any, target: Any) -> Any:
    """Copy a trained AutoencoderKL into one with more latent channels that reconstructs the same at first.

    The old channels come first, now normalised by the network itself (their scale and shift move into the
    convolutions, so that the new configuration has neither); the decoder does not read the new ones yet.

    Args:
        source: trained AutoencoderKL without quant convolutions.
        target: fresh one of the same blocks; filled in place.

    Returns:
        `target`.

    Raises:
        GrowthError: the blocks differ, or the target has fewer latent channels.
    """
    old, new = source.state_dict(), target.state_dict()
    few, many = source.config.latent_channels, target.config.latent_channels
    ends = {"encoder.conv_out.weight", "encoder.conv_out.bias", "decoder.conv_in.weight"}
    differing = [n for n in new if n not in old or (n not in ends and old[n].shape != new[n].shape)]
    if differing or few > many:
        raise GrowthError(f"cannot grow {few} latent channels into {many}; blocks differ in {differing[:3]}")
    scale = float(source.config.scaling_factor)
    shift = float(source.config.shift_factor or 0.0)
    for name in new.keys() - ends:
        new[name].copy_(old[name])
    weight, bias = new["encoder.conv_out.weight"], new["encoder.conv_out.bias"]
    known, known_bias = old["encoder.conv_out.weight"].float(), old["encoder.conv_out.bias"].float()
    weight[:few], bias[:few] = known[:few] * scale, (known_bias[:few] - shift) * scale
    weight[few:many].normal_(std=4 * float(weight[:few].std()))  # about unit size on real pictures
    bias[few:many] = 0.0
    weight[many : many + few] = known[few:]
    bias[many : many + few] = known_bias[few:] + 2 * torch.log(torch.tensor(scale))
    weight[many + few :], bias[many + few :] = 0.0, _NEW_LOGVAR
    reader, read = new["decoder.conv_in.weight"], old["decoder.conv_in.weight"].float()
    reader.zero_()
    reader[:, :few] = read / scale
    new["decoder.conv_in.bias"] += shift * read.sum(dim=(1, 2, 3))
    target.load_state_dict(new)
    return target
