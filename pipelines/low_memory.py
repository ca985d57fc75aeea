"""Running a denoiser at sizes that it was not trained for: with less memory, and with scans in balance."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer


@contextlib.contextmanager
def chunked_feed_forward(transformer: Any, tokens: int | None) -> Iterator[None]:
    """Within the block, feed-forwards work on at most ``tokens`` tokens at a time; None changes nothing.

    Args:
        transformer: a ``GSPN2Transformer2DModel``, whose feed-forward is local to a token.
        tokens: over all pictures of a batch.
    """
    layers: list[nn.Module] = [] if tokens is None else [block.ff for block in transformer.transformer_blocks]
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _in_chunks(layer.forward, tokens or 0)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward  # type: ignore[method-assign]
            else:
                layer.forward = forward  # type: ignore[method-assign]


def _in_chunks(forward: Callable[[torch.Tensor], torch.Tensor], tokens: int) -> Callable[..., torch.Tensor]:
    def run(hidden_states: torch.Tensor) -> torch.Tensor:
        length = max(1, tokens // hidden_states.shape[0])
        if hidden_states.shape[1] <= length:
            return forward(hidden_states)
        out = torch.empty_like(hidden_states)
        for start in range(0, hidden_states.shape[1], length):
            out[:, start : start + length] = forward(hidden_states[:, start : start + length])
        return out

    return run


@contextlib.contextmanager
def balanced_scans(transformer: Any, height: int, width: int) -> Iterator[None]:
    """Within the block, line scans weigh as much as they did at the size of training.

    A scan adds up what it meets along its way, so its output grows with the number of lines, and a picture
    twice as large gets twice the mixing that the following layers are used to. Each direction's output is
    therefore multiplied by the trained number of lines over the present one, if that is below 1.

    Args:
        transformer: a ``GSPN2Transformer2DModel``; ``sample_size`` says what it was trained on.
        height, width: latents of the picture.
    """
    native = transformer.config.sample_size
    vertical, horizontal = min(1.0, native / height), min(1.0, native / width)
    shares = {"down": vertical, "up": vertical, "right": horizontal, "left": horizontal}
    handles = []
    if vertical < 1 or horizontal < 1:
        for module in transformer.modules():
            if isinstance(module, GSPN2Mixer) and module.chunk_size is None:
                factors = torch.tensor([shares[direction] for direction in module.directions])
                factors = factors.repeat_interleave(module.proxy_dim)
                handles.append(module.to_out.register_forward_pre_hook(_multiply(factors)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply(factors: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor]], tuple[torch.Tensor]]:
    placed: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def hook(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0]
        key = (x.device, x.dtype)
        if key not in placed:
            placed[key] = factors.to(*key)
        return (x * placed[key],)

    return hook


def one_by_one(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``function`` over the rows of its tensor arguments that have the batch of the first, one at a time."""
    rows = arguments[0].shape[0]

    def row(value: Any, index: int) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[index : index + 1] if batched else value

    return torch.cat([function(*(row(value, index) for value in arguments)) for index in range(rows)])
