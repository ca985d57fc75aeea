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
    with _replaced([(layer, _in_chunks(layer.forward, tokens or 0)) for layer in layers]):
        yield


@contextlib.contextmanager
def _replaced(forwards: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the block, modules have another ``forward``.

    Hooks would do, too, but compiled blocks do not look whether hooks came after they were compiled.
    """
    before = [module.__dict__.get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (module, _), earlier in zip(forwards, before, strict=True):
            if earlier is None:
                del module.forward  # type: ignore[method-assign]
            else:
                module.forward = earlier  # type: ignore[method-assign]


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
    therefore multiplied by the trained number of lines over the present one, below the trained size as well.

    Args:
        transformer: a ``GSPN2Transformer2DModel``; ``sample_size`` says what it was trained on.
        height, width: latents of the picture.
    """
    native = transformer.config.sample_size
    vertical, horizontal = native / height, native / width
    shares = {"down": vertical, "up": vertical, "right": horizontal, "left": horizontal}
    scaled: list[tuple[nn.Module, Callable[..., Any]]] = []
    factors: dict[Any, torch.Tensor] = {}  # layers are alike: one copy to the device, not one for each
    if (vertical, horizontal) != (1, 1):
        for module in transformer.modules():
            if isinstance(module, GSPN2Mixer) and module.chunk_size is None:
                kind = (module.directions, module.proxy_dim)
                if kind not in factors:
                    one = torch.tensor([shares[direction] for direction in module.directions])
                    wide = one.repeat_interleave(module.proxy_dim)
                    factors[kind] = wide.to(transformer.device, transformer.dtype)
                scaled.append((module.to_out, _scaled(module.to_out.forward, factors[kind])))
    with _replaced(scaled):
        yield


def _scaled(forward: Callable[[torch.Tensor], torch.Tensor], factors: torch.Tensor) -> Callable[..., Any]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return forward(x * factors.to(x.device, x.dtype))

    return run


def one_by_one(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``function`` over the rows of its tensor arguments that have the batch of the first, one at a time."""
    rows = arguments[0].shape[0]

    def row(value: Any, index: int) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[index : index + 1] if batched else value

    return torch.cat([function(*(row(value, index) for value in arguments)) for index in range(rows)])
