"""A tiny emoji folder and tiny frozen models for the training tests."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_models
from PIL import Image

# One plain colour per concept, so that pixels tell which thing is where.
COLOURS = {
    "red apple": (220, 0, 0),
    "blue car": (0, 0, 220),
    "green frog": (0, 180, 0),
    "yellow star": (240, 230, 0),
    "purple ghost": (140, 0, 180),
    "brown bear": (110, 60, 10),
}
_HELD_OUT = {("yellow star", "twemoji"): "unseen_pair", ("purple ghost", "twemoji"): "unseen_pair"}


def write_emoji(folder: Path) -> Path:
    """A prepared emoji folder: six plain squares in two styles, both held-out splits present."""
    rows = []
    for style in ("flat", "twemoji"):
        for name, colour in COLOURS.items():
            concept = name.replace(" ", "-")
            file = f"sprites/{style}/{concept}.webp"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (32, 32), (*colour, 255)).save(folder / file, lossless=True)
            split = "unseen_concept" if name == "brown bear" else _HELD_OUT.get((name, style), "train")
            rows.append(
                {
                    "id": f"{style}/{concept}",
                    "style": style,
                    "concept": concept,
                    "name": name,
                    "aliases": [],
                    "tags": [],
                    "group": "objects",
                    "split": split,
                    "file": file,
                }
            )
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_models(folder: Path) -> Path:
    """vae/, text_encoder/ and tokenizer/ of the tiny pipeline, and transformer.json."""
    tiny_models.tiny_vae().save_pretrained(folder / "vae")
    tiny_models.tiny_text_encoder().save_pretrained(folder / "text_encoder")
    tiny_models.tiny_tokenizer().save_pretrained(folder / "tokenizer")
    config = dict(tiny_models.tiny_transformer(num_layers=1).config)
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    (folder / "transformer.json").write_text(json.dumps(kept), encoding="utf-8")
    vae = {key: value for key, value in tiny_models.tiny_vae().config.items() if not key.startswith("_")}
    (folder / "vae.json").write_text(json.dumps(vae), encoding="utf-8")
    return folder


def denoiser_options(root: Path, output: Path, **changes: object) -> list[str]:
    """Command-line options of a tiny denoiser run."""
    settings: dict[str, object] = {
        "output_dir": output,
        "data": root / "emoji",
        "pretrained": root / "models",
        "transformer_config": root / "models" / "transformer.json",
        "sprite_size": 32,
        "resolution": 16,
        "batch_size": 4,
        "refresh": 2,
        "bank_size": 12,
        "validation_scenes": 4,
        "max_text_tokens": tiny_models.MAX_TOKENS,
        "mixed_precision": "no",
        "warmup_steps": 2,
        "max_train_steps": 4,
        "log_steps": 2,
        "sheet_steps": 2,
        "prefetch": 2,
        "sheet_prompts": root / "prompts.json",
    }
    return options(settings | changes)


def autoencoder_options(root: Path, output: Path, **changes: object) -> list[str]:
    """Command-line options of a tiny autoencoder run."""
    settings: dict[str, object] = {
        "output_dir": output,
        "data": root / "emoji",
        "vae_config": root / "models" / "vae.json",
        "sprite_size": 32,
        "resolution": 16,
        "batch_size": 8,
        "mixed_precision": "no",
        "validation_scenes": 8,
        "statistics_scenes": 32,
        "warmup_steps": 1,
        "learning_rate": 5e-3,
        "max_train_steps": 12,
        "ema_decay": 0.5,
        "log_steps": 4,
    }
    return options(settings | changes)


def options(settings: dict[str, object]) -> list[str]:
    """``--name value`` for each setting."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def write_prompts(path: Path) -> Path:
    """Two prompts for sheets."""
    rows = [{"prompt": "a red apple, flat style", "seed": 1}, {"prompt": "a blue rocket", "seed": 2}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
