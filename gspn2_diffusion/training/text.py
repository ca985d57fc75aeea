"""Captions to the denoiser's conditions: tokens on the CPU, hidden states on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def tokenize(tokenizer: Any, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 and mask bool, both (B, max_length); longer captions are cut."""
    batch = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=max_length, return_tensors="np"
    )
    ids = torch.from_numpy(batch["input_ids"]).long()
    return ids, torch.from_numpy(batch["attention_mask"]).bool()


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
