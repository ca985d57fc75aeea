"""Running a denoiser with less memory and the same result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


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


def one_by_one(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``function`` over the rows of its tensor arguments that have the batch of the first, one at a time."""
    rows = arguments[0].shape[0]

    def row(value: Any, index: int) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[index : index + 1] if batched else value

    return torch.cat([function(*(row(value, index) for value in arguments)) for index in range(rows)])
