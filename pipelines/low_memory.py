"""Running a denoiser at sizes that it was not trained for: with less memory, and with scans in balance."""

from __future__ import annotations

import contextlib
import functools
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
    shares = (native / height, native / width)
    modules = transformer.modules() if shares != (1, 1) else ()
    mixers = [module for module in modules if isinstance(module, GSPN2Mixer) and module.chunk_size is None]
    before = [mixer.direction_scale for mixer in mixers]
    # Weights may be stored in 8 bits, which would round the factors, and be nowhere while they are offloaded.
    dtype = transformer.dtype if transformer.dtype.itemsize > 1 else torch.float32
    device = torch.device("cpu") if transformer.device.type == "meta" else transformer.device
    for mixer in mixers:
        mixer.direction_scale = _direction_scale(mixer.directions, mixer.proxy_dim, *shares, device, dtype)
    try:
        yield
    finally:
        for mixer, earlier in zip(mixers, before, strict=True):
            mixer.direction_scale = earlier


@functools.lru_cache(maxsize=64)  # graphs of calls know the tensors by their addresses
def _direction_scale(
    directions: tuple[str, ...],
    channels: int,
    vertical: float,
    horizontal: float,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The factor of each direction, for each of its channels."""
    shares = [vertical if direction in ("down", "up") else horizontal for direction in directions]
    with torch.inference_mode(False):  # it is kept, also for calls with gradients
        return torch.tensor(shares).repeat_interleave(channels).to(device, dtype)


def one_by_one(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    """``function`` over the rows of its tensor arguments that have the batch of the first, one at a time."""
    rows = arguments[0].shape[0]

    def row(value: Any, index: int) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == rows
        return value[index : index + 1] if batched else value

    return torch.cat([function(*(row(value, index) for value in arguments)) for index in range(rows)])
