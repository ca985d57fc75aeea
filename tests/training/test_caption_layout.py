"""Caption layers that learn from text alone where the things of a scene stand."""

import json
from types import SimpleNamespace

import pytest
import tiny_models
import tiny_training
import torch
import training_forks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from gspn2_diffusion.models.initialization import initialize_for_training
from gspn2_diffusion.training.caption_layout import is_untaught, teach_layout, token_places
from gspn2_diffusion.training.captions import PlacedCaption, SceneOptions, SceneWriter
from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.emoji import load_records, select
from gspn2_diffusion.training.text import CaptionTokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    tiny_training.write_emoji(folder / "emoji")
    tiny_training.write_models(folder / "models")
    tiny_training.write_prompts(folder / "prompts.json")
    return folder


@pytest.fixture(scope="module")
def tokenize():
    return CaptionTokenizer(tiny_models.tiny_tokenizer(), LENGTH)


def encoder_of(captions):
    """A text encoder whose tokens know their word and their number, every word a token."""
    words = sorted({word for text in captions for word in text.replace(",", " ,").split()})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    settings = {"vocab_size": len(vocabulary), "hidden_size": 32, "num_hidden_layers": 1}
    config = BertConfig(
        **settings, num_attention_heads=2, intermediate_size=64, max_position_embeddings=LENGTH
    )
    encoder = tiny_models.randomized(BertModel(config), seed=1, std=0.3)
    return SimpleNamespace(text_encoder=encoder, tokenize=CaptionTokenizer(fast, LENGTH))


def denoiser():
    model = tiny_models.tiny_transformer(
        num_caption_layers=2, num_layers=1, caption_channels=32, num_attention_heads=4, attention_head_dim=16
    )
    initialize_for_training(model)
    return model


def test_scenes_tell_where_their_things_stand(root):
    records = select(load_records(root / "emoji"), "train")
    writer = SceneWriter(records, SceneOptions(pair_probability=0.6, group_probability=0.2))
    found, drawn = writer.places(60, (3,)), writer.write(60, (3,))
    assert sorted(item.caption for item in found) == sorted(drawn.captions)
    for item in found:
        assert all(words in item.caption for words, *_ in item.things)
        if " left of " in item.caption and len(item.things) == 2:
            left, right = sorted(item.things, key=lambda thing: thing[1])
            assert item.caption.index(left[0]) < item.caption.index(right[0])
            assert left[1] < -0.3 < 0.3 < right[1]
    assert {len(item.things) for item in found} == {0, 1, 2}  # one phrase for a group: no place of its own


def test_tokens_of_a_thing_get_its_place(tokenize):
    caption = "a red apple, flat style"
    ids, _, offsets = tokenize.with_offsets([caption])
    places, known = token_places([PlacedCaption(caption, [("a red apple", -0.5, 0.25, 0.4)])], offsets)
    inside = known[0].bool()
    words = tiny_models.tiny_tokenizer().convert_ids_to_tokens(ids[0][inside])
    assert words == ["a", "red", "apple"]
    assert torch.equal(places[0, inside], torch.tensor([[-0.5, 0.25, 0.4]]).expand(3, -1))
    assert not places[0, ~inside].any()


def test_words_that_stand_twice_are_left_out(tokenize):
    item = PlacedCaption("red above red apple", [("red", 0.0, -0.5, 0.4), ("red apple", 0.0, 0.5, 0.4)])
    _, known = token_places([item], tokenize.with_offsets([item.caption])[2])
    assert known.sum() == 2


def test_layers_learn_places_and_nothing_else_changes(root):
    config = DenoiserConfig(output_dir=str(root / "unused"), mixed_precision="no", seed=0)
    run = SimpleNamespace(device=torch.device("cpu"), config=config, autocast=torch.enable_grad)
    records = select(load_records(root / "emoji"), "train")
    options = SceneOptions(pair_probability=1.0, style_probability=0.0, background_probability=0.0)
    writer, model = SceneWriter(records, options), denoiser()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert is_untaught(model)
    encoder = encoder_of(item.caption for item in writer.places(500, (1,)))
    untaught = teach_layout(run, model, encoder, writer, steps=0, batch=1)
    right = teach_layout(run, model, encoder, writer, steps=350, batch=32)
    assert untaught < 0.3
    assert right > 0.8
    assert not is_untaught(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("caption_layers.") for name in changed)


def test_a_run_teaches_once(root):
    """At its start, not when it goes on; caption layers that already do something are left alone."""
    settings = json.loads((root / "models" / "transformer.json").read_text())
    grown = root / "grown.json"
    grown.write_text(json.dumps(settings | {"num_caption_layers": 1}))
    script = training_forks.script("train_text_to_image")

    def train(output, **changes):
        options = {"transformer_config": grown, "caption_layout_steps": 2, "caption_layout_batch": 4}
        options |= {"max_train_steps": 1, "save_pipeline": "false", "sheet_prompts": "none"}
        script.main(tiny_training.denoiser_options(root, root / output, **options | changes))
        lines = (root / output / "metrics.jsonl").read_text().splitlines()
        return sum("caption_layout" in json.loads(line) for line in lines)

    assert train("run") == 1
    assert train("run", max_train_steps=2, resume_from="latest") == 1
    assert train("other", init_from=root / "run" / "transformer") == 0
    assert train("without", caption_layout_steps=0) == 0
