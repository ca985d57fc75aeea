"""Tiny but real models for tests: every component of a pipeline, random weights, quick to build."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, BertTokenizerFast

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_CHANNELS = 16
MAX_TOKENS = 12
WORDS = ("a", "red", "blue", "apple", "rocket", "flat", "style", "on", "background", ",", "##s")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_tiny_pipeline(**transformer_config: Any) -> GSPN2Pipeline:
    """A pipeline that draws 16x16 pictures (VAE scale 2, patch size 2); the same weights on every call."""
    return GSPN2Pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        transformer=tiny_transformer(**transformer_config),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=MAX_TOKENS,
    )


def save_with_few_steps(folder: Path, steps: int = 3, **transformer_config: Any) -> Path:
    """A tiny pipeline that has an adapter for so many steps, in a folder; needs peft."""
    from peft import LoraConfig

    pipe = build_tiny_pipeline(**transformer_config)
    config = LoraConfig(r=2, lora_alpha=20, target_modules=["to_scan", "proj_out"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(folder.with_suffix(".adapter"))
    pipe.unload_lora_weights()
    pipe.add_few_steps(folder.with_suffix(".adapter"), steps)
    pipe.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer of a few words and all letters, so that any lower-case text can be spelled."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*SPECIAL, *WORDS, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return BertTokenizerFast(
        tokenizer_object=tokenizer, vocab=vocabulary, do_lower_case=True, model_max_length=MAX_TOKENS
    )


def tiny_text_encoder() -> BertModel:
    config = BertConfig(
        vocab_size=80,
        hidden_size=TEXT_CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_TOKENS,
    )
    return randomized(BertModel(config), seed=1, std=0.3)


def tiny_vae(**config: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return randomized(AutoencoderKL(**{**settings, **config}), seed=2, std=0.1)


def tiny_transformer(**config: Any) -> GSPN2Transformer2DModel:
    """Random everywhere: freshly initialised, a DiT's zero-initialised gates would hide every input."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_channels": TEXT_CHANNELS,
        "pooled_projection_dim": TEXT_CHANNELS,
    }
    return randomized(GSPN2Transformer2DModel(**{**settings, **config}), seed=3, std=0.15)


def randomized(model: Any, seed: int, std: float) -> Any:
    """Fills matrices and biases with noise, keeps the scales of norms near 1; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in _parameters(model):
        noise = torch.randn(parameter.shape, generator=generator) * std
        around_one = parameter.ndim == 1 and bool((parameter == 1).all())
        parameter.data.copy_(noise + 1 if around_one else noise)
    return model.eval()


def _parameters(model: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    return (parameter for _, parameter in sorted(model.named_parameters()))
