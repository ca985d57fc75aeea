"""Encoding and decoding pictures of any size through an autoencoder, a tile at a time.

A convolutional autoencoder sees a few dozen pixels around each place, so a tile with a margin gives the
pixels of the whole picture, but for two things: its group normalisations take mean and variance over whatever
they are shown, and some autoencoders have an attention in the middle. The statistics are therefore taken
once, from the whole picture in small, and pinned for all tiles (:func:`pinned_statistics`); what remains is
blended over the inner half of the margins, and the outer half is thrown away.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Coder = Callable[[torch.Tensor], torch.Tensor]
# Latents around a tile that are computed with it. The convolutions of diffusers' autoencoders for pictures
# reach 14 to 18 latents, but what lies beyond half of that hardly counts.
MARGIN = 16
# Longest side, in latents, of the small picture from which statistics are taken.
SMALL = 64


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in latents: its own part, and the part computed with its margins."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, tile: int, margin: int = MARGIN) -> list[Span]:
    """Cuts ``length`` into equal tiles of at most ``tile``, with ``margin`` on both sides where there is.

    Raises:
        ValueError: ``tile`` is smaller than two margins, so that tiles could blend with the next but one.
    """
    if tile < 2 * margin and tile < length:
        raise ValueError(f"`tile` must be at least {2 * margin} latents, got {tile}")
    count = -(-length // tile)
    edges = [round(index * length / count) for index in range(count + 1)]
    return [
        Span(start, stop, max(0, start - margin), min(length, stop + margin))
        for start, stop in itertools.pairwise(edges)
    ]


def blend_weights(span: Span, length: int, scale: int, margin: int = MARGIN) -> torch.Tensor:
    """Weights ``((last - first) * scale,)`` float32 of a tile's pixels; those of neighbours add up to 1.

    They rise and fall linearly within half a margin around the tile's borders and are 0 beyond.
    """
    width = margin // 2 * scale
    place = torch.arange(span.first * scale, span.last * scale) + 0.5
    weights = torch.ones(len(place))
    if span.start > 0:
        weights = weights * ((place - span.start * scale + width) / (2 * width)).clamp(0, 1)
    if span.stop < length:
        weights = weights * ((span.stop * scale + width - place) / (2 * width)).clamp(0, 1)
    return weights


def decode_strips(
    decode: Coder, latents: torch.Tensor, scale: int, tile: int, margin: int = MARGIN
) -> Iterator[torch.Tensor]:
    """Strips of the decoded picture, from the top, each as soon as it is complete.

    Args:
        decode: ``(1, C, h, w)`` to pixels ``(1, 3, h * scale, w * scale)``.
        latents: ``(1, C, H, W)``.
        tile: side of a tile in latents, without margins.

    Yields:
        ``(3, rows, W * scale)`` float32 on the CPU.
    """
    height, width = latents.shape[-2:]
    columns = spans(width, tile, margin)
    carried: torch.Tensor | None = None  # rows that the next row of tiles adds to
    for row in spans(height, tile, margin):
        strip = torch.zeros(3, (row.last - row.first) * scale, width * scale)
        if carried is not None:
            strip[:, : carried.shape[1]] += carried
        vertical = blend_weights(row, height, scale, margin)[:, None]
        for column in columns:
            piece = latents[..., row.first : row.last, column.first : column.last]
            pixels = decode(piece)[0].float().cpu()
            weights = vertical * blend_weights(column, width, scale, margin)
            strip[..., column.first * scale : column.last * scale] += pixels * weights
        if row.stop == height:
            yield strip
            return
        # The next row of tiles is computed from `row.stop - margin` on.
        cut = (max(0, row.stop - margin) - row.first) * scale
        yield strip[:, :cut]
        carried = strip[:, cut:].clone()


def map_tiles(
    compute: Callable[[Span, Span], torch.Tensor],
    channels: int,
    height: int,
    width: int,
    tile: int,
    device: torch.device,
    margin: int = MARGIN,
) -> torch.Tensor:
    """``(1, channels, height, width)`` float32 from tiles that ``compute`` gives with their margins."""
    whole = torch.zeros(1, channels, height, width, device=device)
    for row in spans(height, tile, margin):
        vertical = blend_weights(row, height, 1, margin)[:, None]
        for column in spans(width, tile, margin):
            weights = (vertical * blend_weights(column, width, 1, margin)).to(device)
            whole[..., row.first : row.last, column.first : column.last] += compute(row, column) * weights
    return whole


def upscale_tiles(
    decode: Coder,
    encode: Coder,
    latents: torch.Tensor,
    size: tuple[int, int],
    scale: int,
    tile: int,
    margin: int = MARGIN,
) -> torch.Tensor:
    """Latents of the picture enlarged to ``size`` latents, without the picture ever being whole in memory.

    Each tile of the result is encoded from pixels that are sampled (bicubic) from the decoded part of the
    picture they lie in.

    Args:
        decode, encode: between ``(1, C, h, w)`` and ``(1, 3, h * scale, w * scale)``.
        latents: ``(1, C, H, W)``.
        size: height and width in latents, at least those of ``latents``.
        tile: side of a tile of the result in latents, without margins.

    Returns:
        ``(1, C, *size)`` float32 on the device of ``latents``.
    """

    def compute(row: Span, column: Span) -> torch.Tensor:
        window = [
            _source(span, old, new)
            for span, old, new in zip((row, column), latents.shape[-2:], size, strict=True)
        ]
        (top, bottom), (left, right) = window
        pixels = decode(latents[..., top:bottom, left:right])
        axes = [
            _places(span, start, old, new, scale, length)
            for span, (start, _), old, new, length in zip(
                (row, column), window, latents.shape[-2:], size, pixels.shape[-2:], strict=True
            )
        ]
        vertical, horizontal = (axis.to(pixels) for axis in axes)
        grid = torch.stack(
            (
                horizontal.expand(len(vertical), -1),
                vertical[:, None].expand(-1, len(horizontal)),
            ),
            dim=-1,
        )
        enlarged = F.grid_sample(
            pixels, grid[None], mode="bicubic", padding_mode="border", align_corners=False
        )
        return encode(enlarged).float()

    return map_tiles(compute, latents.shape[1], *size, tile, latents.device, margin)


def _source(span: Span, old: int, new: int) -> tuple[int, int]:
    """The part of the old latents that a tile of the new ones is made from, with a margin of its own."""
    return max(0, span.first * old // new - MARGIN), min(old, -(-span.last * old // new) + MARGIN)


def _places(span: Span, start: int, old: int, new: int, scale: int, length: int) -> torch.Tensor:
    """Where the tile's pixels lie in the decoded part, as grid_sample counts (-1 to 1 over its pixels)."""
    place = (torch.arange(span.first * scale, span.last * scale, dtype=torch.float64) + 0.5) * old / new
    return (place - start * scale) / length * 2 - 1


@contextlib.contextmanager
def pinned_statistics(part: nn.Module, run_small: Callable[[], Any]) -> Iterator[None]:
    """Within the block, group normalisations of ``part`` use the statistics that they saw in ``run_small``.

    Args:
        part: a VAE's encoder or decoder. Parts that are offloaded layer by layer are left as they are.
        run_small: runs ``part`` once on the whole picture in small.
    """
    norms = [module for module in part.modules() if isinstance(module, nn.GroupNorm)]
    if any("forward" in norm.__dict__ for norm in norms):  # hooks of offloading; blending has to do
        norms = []
    seen: dict[nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        groups = args[0][0].float().reshape(norm.num_groups, -1)
        seen[norm] = (groups.mean(dim=1), groups.var(dim=1, unbiased=False))

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        if norms:
            run_small()
    finally:
        for handle in handles:
            handle.remove()
    try:
        for norm, (mean, variance) in seen.items():
            norm.forward = _Pinned(norm, mean, variance)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for norm in seen:
            del norm.forward  # type: ignore[method-assign]


class _Pinned:
    """Forward of a group normalisation whose mean and variance are given."""

    def __init__(self, norm: nn.GroupNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.norm = norm
        repeat = norm.num_channels // norm.num_groups
        self.mean, self.variance = mean.repeat_interleave(repeat), variance.repeat_interleave(repeat)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
        return F.batch_norm(hidden_states, self.mean, self.variance, weight, bias, eps=norm.eps)


def in_small(picture: torch.Tensor, longest: int) -> torch.Tensor:
    """``(1, C, h, w)`` averaged down until no side is longer than ``longest``; as it is if none is."""
    height, width = picture.shape[-2:]
    factor = longest / max(height, width)
    if factor >= 1:
        return picture
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return F.interpolate(picture, size=size, mode="area")
