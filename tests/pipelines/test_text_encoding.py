"""Prompts to embeddings: truncation and its warning, padding, pooling, and text encoders other than BERT."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import (
    MAX_TOKENS,
    TEXT_CHANNELS,
    build_tiny_pipeline,
    randomized,
    tiny_text_encoder,
    tiny_tokenizer,
)
from transformers import GemmaConfig, GemmaModel, T5Config, T5EncoderModel

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.text_encoding import dropped_text, encode_texts, masked_mean, pad_tokens

CPU = torch.device("cpu")
LONG = (
    "a red apple on a blue background, Flat  style, a rocket"  # 10 of its pieces fit beside [CLS] and [SEP]
)


def encode(
    texts: list[str], length: int = MAX_TOKENS, tokenizer: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return encode_texts(texts, tokenizer or tiny_tokenizer(), tiny_text_encoder(), length, CPU)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours: with CI set in the environment, transformers' own come here as well."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("gspn2_diffusion")]


def test_long_prompt_warns_and_quotes_what_was_dropped(
    pipe: GSPN2Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    assert dropped_text(LONG, pipe.tokenizer, MAX_TOKENS) == ", a rocket"
    with caplog.at_level(logging.WARNING, logger="gspn2_diffusion"):
        pipe(["a rocket", LONG], num_inference_steps=1, output_type="latent")
    (message,) = warnings_of(caplog)
    assert "15 tokens" in message
    assert f"reads {MAX_TOKENS}" in message
    assert "', a rocket'" in message


def test_long_prompt_is_read_up_to_the_limit() -> None:
    cut, cut_mask = encode([LONG])
    short, short_mask = encode([LONG.removesuffix(", a rocket")])
    assert torch.equal(cut, short)
    assert torch.equal(cut_mask, short_mask)
    assert cut_mask.sum() == MAX_TOKENS


def test_fitting_prompt_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gspn2_diffusion"):
        encode(["a red apple", ""])
    assert not warnings_of(caplog)


def test_mask_marks_the_tokens_and_padding_changes_nothing() -> None:
    hidden, mask = encode(["a red apple", ""])
    assert mask.tolist() == [[1] * 5 + [0] * 7, [1] * 2 + [0] * 10]  # [CLS] ... [SEP]
    alone, alone_mask = encode(["a red apple"], length=5)
    # Products of 12 rows and of 5 may round differently; padding that counts would change far more.
    torch.testing.assert_close(hidden[:1, :5], alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        masked_mean(hidden, mask)[:1], masked_mean(alone, alone_mask), atol=2e-5, rtol=0
    )


def test_max_sequence_length_of_a_call(pipe: GSPN2Pipeline) -> None:
    assert pipe.encode_prompt("a")[0].shape == (1, MAX_TOKENS, TEXT_CHANNELS)
    assert pipe.encode_prompt("a", max_sequence_length=7)[0].shape == (1, 7, TEXT_CHANNELS)


def test_a_tokenizer_without_special_tokens_never_masks_everything() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    hidden, mask = encode(["", "a"], tokenizer=tokenizer)
    assert mask.sum(dim=1).tolist() == [1, 1]
    assert hidden.isfinite().all()


def test_masked_mean() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(hidden, mask).tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert masked_mean(hidden.bfloat16(), mask.bool()).dtype == torch.bfloat16


def test_pad_tokens() -> None:
    embeds, mask = pad_tokens(torch.ones(1, 2, 3), torch.ones(1, 2), 4)
    assert embeds[0, :, 0].tolist() == mask[0].tolist() == [1, 1, 0, 0]
    assert pad_tokens(embeds, mask, 3)[0] is embeds


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=80, d_model=TEXT_CHANNELS, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return randomized(T5EncoderModel(config), seed=1, std=0.3)


def gemma() -> GemmaModel:
    config = GemmaConfig(
        vocab_size=80,
        hidden_size=TEXT_CHANNELS,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return randomized(GemmaModel(config), seed=1, std=0.3)


@pytest.mark.parametrize("build", [t5, gemma])
def test_other_text_encoders(build: Any, tmp_path: Any) -> None:
    pipe = build_tiny_pipeline()
    pipe.text_encoder = build()
    pipe.tokenizer.padding_side = "left"  # as Gemma's is
    options = {"num_inference_steps": 2, "output_type": "latent"}
    pictures = pipe(
        ["a red apple", "a"], generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)], **options
    )
    alone = pipe("a", generator=torch.Generator().manual_seed(1), **options).images
    torch.testing.assert_close(pictures.images[1:], alone, atol=1e-4, rtol=0)
    pipe.register_modules(text_encoder=pipe.text_encoder)
    pipe.save_pretrained(tmp_path)
    again = GSPN2Pipeline.from_pretrained(tmp_path)(
        "a", generator=torch.Generator().manual_seed(1), **options
    )
    # Loaded weights lie at other addresses, and sums may go in another order; latents reach 10.
    torch.testing.assert_close(again.images, alone, atol=1e-4, rtol=0)
