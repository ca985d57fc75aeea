"""Prompts to token embeddings, with any tokenizer and encoder of transformers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def encode_texts(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    max_length: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes texts, padded on the right to ``max_length`` tokens; longer ones are cut with a warning.

    Returns:
        ``last_hidden_state (B, max_length, C)`` in the encoder's dtype, and the mask ``(B, max_length)``
        int64, 1 for tokens and 0 for padding. A text without any token keeps one pad token, so that
        no row masks everything.

    Raises:
        TypeError: The encoder's output has no ``last_hidden_state``.
    """
    warn_about_dropped_text(texts, tokenizer, max_length)
    if tokenizer.pad_token is None:  # decoder-only tokenizers; the mask hides what is put there
        tokenizer.pad_token = tokenizer.eos_token
    tokens = tokenizer(
        texts,
        padding="max_length",
        padding_side="right",
        max_length=max_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.to(torch.int64)
    mask[:, 0] = 1
    ids, mask = tokens.input_ids.to(device), mask.to(device)
    output = text_encoder(ids, attention_mask=mask)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise TypeError(
            f"`text_encoder` must return last_hidden_state, {type(text_encoder).__name__} returns "
            f"{type(output).__name__}; use the base model without a head"
        )
    return hidden, mask


def warn_about_dropped_text(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Logs one warning for each text longer than ``max_length`` tokens, quoting the part that is not read."""
    lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
    for text, length in zip(texts, lengths, strict=True):
        if length > max_length:
            dropped = dropped_text(text, tokenizer, max_length)
            logger.warning(
                "The prompt has %d tokens, the text encoder reads %d; this part was dropped: %r",
                length,
                max_length,
                dropped,
            )


def dropped_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """The end of ``text`` that does not fit into ``max_length`` tokens, special tokens counted."""
    keep = max(max_length - tokenizer.num_special_tokens_to_add(), 0)
    options: dict[str, Any] = {"add_special_tokens": False, "truncation": False, "verbose": False}
    if tokenizer.is_fast:
        offsets = tokenizer(text, return_offsets_mapping=True, **options).offset_mapping
        return text[offsets[keep][0] :] if keep < len(offsets) else ""
    ids = tokenizer(text, **options).input_ids
    return str(tokenizer.decode(ids[keep:]))


def masked_mean(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the kept tokens, summed in float32.

    Args:
        hidden_states: ``(B, L, C)``.
        mask: ``(B, L)``, non-zero = keep.

    Returns:
        ``(B, C)`` in the dtype of ``hidden_states``; zeros where a mask keeps nothing.
    """
    keep = (mask != 0).to(torch.float32).unsqueeze(-1)
    total = (hidden_states.float() * keep).sum(dim=1)
    return (total / keep.sum(dim=1).clamp(min=1.0)).to(hidden_states.dtype)


def pad_tokens(embeds: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads ``embeds (B, L, C)`` with zeros and ``mask (B, L)`` with 0 on the right to ``length`` tokens."""
    missing = length - embeds.shape[1]
    if missing <= 0:
        return embeds, mask
    return torch.nn.functional.pad(embeds, (0, 0, 0, missing)), torch.nn.functional.pad(mask, (0, missing))
