"""Tokens are never copied: one layout, channels last, from the first block to the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gspn2_diffusion.layers import mixer as mixer_module

HEIGHT, WIDTH = 12, 10
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten.cat")


class Recorder(TorchDispatchMode):
    """Names and sizes of the operators that write new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, torch.Tensor):
            given = [value.untyped_storage().data_ptr() for value in args if isinstance(value, torch.Tensor)]
            if first.untyped_storage().data_ptr() not in given:
                self.made.append((str(function), first.numel()))
        return result


@contextmanager
def scan_apart(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The scan runs as ever, but what it does inside (here: the reference in Python) is not recorded."""
    real, calls = mixer_module.line_scan, []

    def scan(*args: Any, **kwargs: Any) -> torch.Tensor:
        pointers = [value.untyped_storage().data_ptr() for value in args]
        calls.append({"storages": pointers, "strides": [value.stride() for value in args]})
        with _disable_current_modes():
            return real(*args, **kwargs)

    monkeypatch.setattr(mixer_module, "line_scan", scan)
    with recorder, torch.no_grad():
        yield calls


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_copies_no_tokens(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.tiny_transformer(num_layers=1)
    block, dim = model.transformer_blocks[0], model.patch_embed.out_features
    tokens, recorder = torch.randn(batch, HEIGHT * WIDTH, dim), Recorder()
    text, temb = torch.randn(batch, 5, dim), torch.randn(batch, 6 * dim)
    with scan_apart(recorder, monkeypatch) as calls:
        block(tokens, text, None, temb, HEIGHT, WIDTH)
    assert not [made for made in recorder.made if made[0].startswith(COPIES)]
    (call,) = calls
    assert len(set(call["storages"][1:])) == 1  # weight, lam and u are views of one projection
    assert all(strides[-1] == 1 for strides in call["strides"])
    products = [size for name, size in recorder.made if name.startswith("aten.addmm")]
    assert len(products) == 3 + 4 + 2  # mixer, cross-attention, feed-forward
    convolutions = [size for name, size in recorder.made if name.startswith("aten.convolution")]
    assert convolutions == [batch * HEIGHT * WIDTH * dim]


def test_a_model_copies_tokens_at_its_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Picture to patches, the embedding's clone (see the model's forward pass), patches to picture."""
    model = tiny_models.tiny_transformer(num_layers=3)
    dim, recorder = model.patch_embed.out_features, Recorder()
    pooled = model.config.pooled_projection_dim
    arguments = {
        "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
        "timestep": torch.tensor([500.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 5, tiny_models.TEXT_CHANNELS),
        "encoder_attention_mask": torch.ones(2, 5),
        "pooled_projections": None if pooled is None else torch.randn(2, pooled),
    }
    with scan_apart(recorder, monkeypatch) as calls:
        model(**arguments)
    assert len(calls) == 3
    whole = 2 * HEIGHT * WIDTH * dim  # patches have as many channels in this model
    copies = [made for made in recorder.made if made[0].startswith(COPIES) and made[1] >= whole]
    assert copies == [("aten.clone.default", whole)] * 3
