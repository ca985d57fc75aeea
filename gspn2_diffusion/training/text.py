"""Captions to the denoiser's conditions: tokens on the CPU, hidden states on the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class TextStates:
    """Encoded captions.

    Attributes:
        hidden: (B, L, D), last hidden states.
        mask: (B, L) bool, True at real tokens.
        pooled: (B, D), mean of the hidden states over real tokens.
    """

    hidden: Tensor
    mask: Tensor
    pooled: Tensor


class CaptionTokenizer:
    """The tokenizer for the caption thread: a copy of its Rust core with the padding set once.

    The tokenizer itself changes its padding in every call, which two threads must not do at a time, and
    spends more time around the core than in it.

    Args:
        tokenizer: a fast tokenizer.
        max_length: length of the rows; longer captions are cut.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._core = copy.deepcopy(tokenizer.backend_tokenizer)
        self._core.enable_truncation(max_length)
        self._core.enable_padding(
            length=max_length, pad_id=tokenizer.pad_token_id, pad_token=str(tokenizer.pad_token)
        )

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 and mask bool, both (B, max_length)."""
        return _ids_and_mask(self._core.encode_batch(list(captions)))

    def with_offsets(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and mask as from a call, and where each token begins and ends in its caption.

        The offsets are int64 (B, max_length, 2); special tokens have 0, 0.
        """
        rows = self._core.encode_batch(list(captions))
        offsets = np.array([row.offsets for row in rows], dtype=np.int64)
        return *_ids_and_mask(rows), torch.from_numpy(offsets)


def _ids_and_mask(rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
    ids = np.array([row.ids for row in rows], dtype=np.int64)
    mask = np.array([row.attention_mask for row in rows], dtype=bool)
    return torch.from_numpy(ids), torch.from_numpy(mask)


@torch.no_grad()
def encode_text(text_encoder: nn.Module, ids: Tensor, mask: Tensor) -> TextStates:
    """Run the text encoder.

    The mask goes in as (B, 1, L, L): from a two-dimensional one the encoder would ask the device whether
    anything is masked, and wait for it, in every step.

    Args:
        text_encoder: a BertModel or alike.
        ids: (B, L) int64.
        mask: (B, L) bool.
    """
    wide = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
    hidden = text_encoder(input_ids=ids, attention_mask=wide).last_hidden_state
    weight = mask.unsqueeze(-1).float()
    pooled = (hidden.float() * weight).sum(dim=1) / weight.sum(dim=1)
    return TextStates(hidden, mask, pooled.to(hidden.dtype))
