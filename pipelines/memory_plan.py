"""Planning a large picture: which sizes it grows through, and how to stay within a memory budget.

Estimates count the tensors that are alive at the widest point of a block, in elements per token or per pixel,
and add a fifth. What can be cut without changing the result is cut until the plan fits: guidance's two halves
run one after the other, the feed-forward works on some tokens at a time (it is local to a token), the
autoencoder on tiles. The scan itself needs the whole picture, and is never cut.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from gspn2_diffusion.pipelines.tiled_vae import MARGIN

_SAFETY = 1.2
_WORKSPACE = 128 * 2**20  # of libraries, whatever the size
_TILES = (512, 384, 256, 192, 128, 96, 64, 48, 2 * MARGIN)
_CHUNKS = (262144, 65536, 16384, 4096)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """How a picture is computed.

    Attributes:
        height, width: pixels.
        budget: bytes that may be in use on the device.
        peak: bytes that are estimated to be in use at most, weights included.
        guidance_together: whether both halves of a guided step are one batch.
        feed_forward_tokens: tokens that a feed-forward works on at a time; None for all.
        vae_tile: side of the autoencoder's tiles in latents, without their margins.
        vae_tiles: their number, down and across.
    """

    height: int
    width: int
    budget: int
    peak: int
    guidance_together: bool
    feed_forward_tokens: int | None
    vae_tile: int
    vae_tiles: tuple[int, int]

    def __str__(self) -> str:
        """One line for people."""
        memory = f"{self.peak / 1e9:.1f} of {self.budget / 1e9:.1f} GB"
        parts = [
            f"{self.width} x {self.height} pixels in about {memory}",
            "guidance in one batch" if self.guidance_together else "guidance in two passes",
            "feed-forward whole"
            if self.feed_forward_tokens is None
            else f"feed-forward {self.feed_forward_tokens} tokens at a time",
            "VAE whole"
            if self.vae_tiles == (1, 1)
            else f"VAE in {self.vae_tiles[0]} x {self.vae_tiles[1]} tiles of {self.vae_tile} latents",
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class Costs:
    """Bytes of a pipeline's parts.

    Attributes:
        resident: in use whatever is drawn: weights, and what else the process holds.
        token: alive per token in the widest part of a block, the feed-forward's inside excepted.
        token_feed_forward: per token inside the feed-forward.
        latent: per latent position: latents, noise and predictions, all channels.
        vae: per latent position of a tile.
        patch: latent positions along the side of a token.
        scale: pixels along the side of a latent position.
        strip: per pixel of the strip of finished tiles, where it is on the device.
    """

    resident: int
    token: int
    token_feed_forward: int
    latent: int
    vae: int
    patch: int
    scale: int
    strip: int


def measure_costs(transformer: Any, vae: Any, scale: int, resident: int, on_cpu: bool) -> Costs:
    """The costs of a denoiser and an autoencoder, from their configurations and dtypes."""
    config, size = transformer.config, transformer.dtype.itemsize
    dim = config.num_attention_heads * config.attention_head_dim
    proxy = config.proxy_dim or max(1, dim // 8)
    scan = proxy * (1 + 4 * 3) + 4 * 3 * config.num_weight_groups  # proxy, lam, u and y, weights
    hidden = transformer.transformer_blocks[0].ff.net[-1].in_features
    # Plain torch keeps float32 copies of what it scans, and the states of all directions.
    scan_bytes = scan * size + (2 * scan * 4 if on_cpu else 0)
    widths = vae.config.get("decoder_block_out_channels") or vae.config.get("block_out_channels") or (64,)
    return Costs(
        resident=resident,
        token=4 * dim * size + max(scan_bytes, dim * size),
        token_feed_forward=4 * hidden * size,
        latent=8 * 4 * config.in_channels,
        vae=(4 * max(widths[:2]) * vae.dtype.itemsize + 16 * 4) * scale * scale,
        patch=config.patch_size,
        scale=scale,
        strip=12 if on_cpu else 0,
    )


def make_plan(costs: Costs, height: int, width: int, guided: bool, budget: int) -> MemoryPlan:
    """The fastest plan for ``height x width`` pixels within ``budget`` bytes.

    Raises:
        ValueError: there is none; names the largest picture of this shape that would fit.
    """
    plan = _try_plan(costs, height, width, guided, budget)
    if plan is not None:
        return plan
    fitting = _largest(costs, height, width, guided, budget)
    instead = f"{fitting[0]} x {fitting[1]} would fit" if fitting else "nothing of this shape would fit"
    least = _peak(costs, height, width, 1, _CHUNKS[-1], _TILES[-1])
    raise ValueError(
        f"`height` x `width` of {height} x {width} needs at least {least / 1e9:.2f} GB, "
        f"`memory_budget` is {budget / 1e9:.2f} GB; {instead}"
    )


def _try_plan(costs: Costs, height: int, width: int, guided: bool, budget: int) -> MemoryPlan | None:
    tokens, latents = _counts(costs, height, width)
    whole = (
        (max(*latents, _TILES[-1]),) if max(latents) <= _TILES[0] else ()
    )  # tensors stay below 2**31 elements
    fitting = [t for t in (*whole, *_TILES) if _vae_bytes(costs, latents, t) <= budget]
    if not fitting:
        return None
    # Convolutions take workspaces that nobody can foresee, and a smaller tile costs little time.
    half = costs.resident + (budget - costs.resident) // 2
    tile = next((t for t in fitting if _vae_bytes(costs, latents, t) <= half), fitting[-1])
    for rows in (2, 1) if guided else (1,):
        for chunk in (None, *_CHUNKS):
            if chunk is not None and chunk >= rows * tokens:
                continue
            if _denoiser_bytes(costs, tokens, latents, rows, chunk) <= budget:
                return MemoryPlan(
                    height,
                    width,
                    budget,
                    _peak(costs, height, width, rows, chunk, tile),
                    guidance_together=rows == 2 or not guided,
                    feed_forward_tokens=chunk,
                    vae_tile=tile,
                    vae_tiles=(-(-latents[0] // tile), -(-latents[1] // tile)),
                )
    return None


def _counts(costs: Costs, height: int, width: int) -> tuple[int, tuple[int, int]]:
    side = costs.scale * costs.patch
    down, across = -(-height // side), -(-width // side)
    return down * across, (down * costs.patch, across * costs.patch)


def _peak(costs: Costs, height: int, width: int, rows: int, chunk: int | None, tile: int) -> int:
    tokens, latents = _counts(costs, height, width)
    return max(
        _denoiser_bytes(costs, tokens, latents, rows, chunk),
        _vae_bytes(costs, latents, min(tile, max(latents))),
    )


def _denoiser_bytes(costs: Costs, tokens: int, latents: tuple[int, int], rows: int, chunk: int | None) -> int:
    inside = costs.token_feed_forward * min(chunk or rows * tokens, rows * tokens)
    return _total(costs, latents, costs.token * rows * tokens + inside)


def _vae_bytes(costs: Costs, latents: tuple[int, int], tile: int) -> int:
    sides = [min(length, tile + (2 * MARGIN if tile < length else 0)) for length in latents]
    strip = costs.strip * sides[0] * latents[1] * costs.scale**2
    return _total(costs, latents, costs.vae * sides[0] * sides[1] + 2 * strip)


def _total(costs: Costs, latents: tuple[int, int], working: int) -> int:
    return costs.resident + _WORKSPACE + int(_SAFETY * (working + costs.latent * latents[0] * latents[1]))


def _largest(costs: Costs, height: int, width: int, guided: bool, budget: int) -> tuple[int, int] | None:
    """The largest size of the same shape that fits, in multiples of a token."""
    multiple = costs.scale * costs.patch

    def scaled(share: float) -> tuple[int, int]:
        return (
            max(1, int(height * share) // multiple) * multiple,
            max(1, int(width * share) // multiple) * multiple,
        )

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        fits = _try_plan(costs, *scaled(middle), guided, budget) is not None
        low, high = (middle, high) if fits else (low, middle)
    return scaled(low) if low > 0 else None


def plan_sizes(native: int, height: int, width: int, multiple: int) -> list[tuple[int, int]]:
    """The sizes that a picture grows through, from about ``native x native`` pixels to ``height x width``.

    Each is at most twice the one before along a side, all have the shape of the last and are multiples of
    ``multiple`` (the last is rounded up; the caller cuts it). Long pictures begin larger than the native
    area, so that their short side is at least half of ``native``.
    """
    scale = min(1.0, max(native / math.sqrt(height * width), native / 2 / min(height, width)))
    count = max(0, math.ceil(math.log2(1 / scale) - 0.05))
    shares = [scale ** (1 - index / count) for index in range(count)] if count else []
    return [
        (_round_up(height * share, multiple), _round_up(width * share, multiple)) for share in (*shares, 1.0)
    ]


def _round_up(length: float, multiple: int) -> int:
    return max(1, math.ceil(length / multiple - 1e-9)) * multiple


def parse_budget(budget: int | float | str) -> int:
    """Bytes out of a number of bytes or a text such as "12GB" or "8 GiB".

    Raises:
        TypeError, ValueError: something else, or not above 0.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"`memory_budget` must be a number of bytes or a text like '12GB', got {budget!r}")
    text = str(budget).strip()
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS or match[1].count(".") > 1:
        raise ValueError(f"`memory_budget` must be a number of bytes or a text like '12GB', got {budget!r}")
    size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"`memory_budget` must be above 0, got {budget!r}")
    return size


def memory_state(device: torch.device) -> tuple[int, int]:
    """Bytes in use by this process on ``device``, and how many it may use: nine tenths of what it can get."""
    if device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    else:
        import psutil  # accelerate needs it too

        used = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
    return used, used + int(0.9 * free)
