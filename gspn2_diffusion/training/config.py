"""Typed run settings: a YAML or JSON file, then command-line options; checked before heavy work."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it."""


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and the words that ``--help`` shows."""
    return field(default=default, metadata={"help": text})


@dataclass
class RunConfig:
    """What every training script shares."""

    output_dir: str = option("", "folder of the run: checkpoints, sheets, metrics, final weights")
    data: str = option("data/emoji", "emoji folder or archive; or a folder, file, pattern or Hub name")
    sprite_cache: str | None = option(None, "folder for the drawn sprites, shared by all processes of a host")
    sprite_size: int = option(256, "side of the drawn sprites in pixels")
    data_fraction: float = option(1.0, "share of the training records that is used (for quick tries)")
    resolution: int = option(256, "side of the composed scenes in pixels")
    seed: int = option(0, "decides weights, scenes and noise together with the rank and the step")
    batch_size: int = option(256, "pictures per optimiser micro-step and process")
    gradient_accumulation_steps: int = option(1, "micro-steps per optimiser step")
    max_train_steps: int | None = option(None, "end at this optimiser step, resumed ones counted in")
    max_train_minutes: float | None = option(None, "end this many minutes after this process started")
    learning_rate: float = option(1e-3, "peak learning rate")
    warmup_steps: int = option(100, "linear warm-up, counted from where the optimiser started")
    lr_schedule: str = option("linear", "shape of the final decay: linear, cosine, or constant for none")
    lr_decay_fraction: float = option(0.3, "last share of the budget over which the rate falls to zero")
    optimizer: str = option("adamw", "adamw (fused on CUDA), adamw8bit (8-bit moments) or muon")
    adam_beta1: float = option(0.9, "first moment")
    adam_beta2: float = option(0.99, "second moment")
    weight_decay: float = option(0.01, "decoupled, on matrices only")
    max_grad_norm: float = option(1.0, "gradient clipping; 0 turns it off")
    ema_decay: float = option(0.999, "of the averaged weights")
    mixed_precision: str = option("bf16", "bf16 or no (autocast; weights stay float32)")
    compile: bool = option(True, "torch.compile on CUDA")
    compile_scope: str = option("blocks", "blocks (one repeated block: compiles fast) or model (whole)")
    compile_fullgraph: bool = option(False, "fail instead of breaking the graph")
    compile_mode: str | None = option(None, "mode of torch.compile, such as max-autotune-no-cudagraphs")
    static_graph: bool = option(False, "static graph of DistributedDataParallel")
    log_steps: int = option(20, "one line each so many steps")
    validate_steps: int | None = option(None, "validation each so many steps")
    validate_minutes: float | None = option(None, "validation each so many minutes")
    sample_steps: int | None = option(None, "picture sheet each so many steps")
    sample_minutes: float | None = option(None, "picture sheet each so many minutes")
    sample_at_start: bool = option(True, "a picture sheet of step 0, where sheets are made at all")
    trackers: str = option("tensorboard", "accelerate's trackers, separated by commas, or none")
    progress_bar: str = option("auto", "yes, no, or auto: on a terminal")
    checkpoint_steps: int | None = option(None, "checkpoint each so many steps")
    checkpoint_minutes: float | None = option(None, "checkpoint each so many minutes")
    keep_checkpoints: int = option(2, "older checkpoints are deleted")
    final_checkpoint: bool = option(True, "write a full checkpoint at the end")
    resume_from: str = option("none", "latest, none, or a checkpoint or compact folder")
    save_compact: str | None = option(None, "folder for small bf16 files that carry the run elsewhere")
    compact_contents: str = option("both", "both, ema or raw weights in the compact files")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        if not self.output_dir:
            raise ConfigError("`output_dir` is empty; name a folder for the run")
        if self.max_train_steps is None and self.max_train_minutes is None:
            raise ConfigError("give `max_train_steps` or `max_train_minutes`, or both")
        _among("optimizer", self.optimizer, ("adamw", "adamw8bit", "muon"))
        _among("lr_schedule", self.lr_schedule, ("linear", "cosine", "constant"))
        _among("progress_bar", self.progress_bar, ("auto", "yes", "no"))
        _among("mixed_precision", self.mixed_precision, ("bf16", "no"))
        _among("compile_scope", self.compile_scope, ("blocks", "model"))
        _among("compact_contents", self.compact_contents, ("both", "ema", "raw"))
        for name in ("batch_size", "gradient_accumulation_steps", "log_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; at least 1 is needed")
        for name in ("lr_decay_fraction", "data_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; allowed: 0 to 1")
        for name in _TRIGGERS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"`{name}` is {value}; allowed: above 0, or leave it out")
        if self.resolution < 8 or self.resolution % 8:
            raise ConfigError(f"`resolution` is {self.resolution}; allowed: multiples of 8")


DATA_FORMATS = ("auto", "emoji", "folder", "parquet", "webdataset", "hub")
_TRIGGERS = (
    "max_train_steps",
    "max_train_minutes",
    "validate_steps",
    "validate_minutes",
    "sample_steps",
    "sample_minutes",
    "checkpoint_steps",
    "checkpoint_minutes",
)


def _among(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"`{name}` is {value!r}; allowed: {', '.join(allowed)}")


@dataclass
class AutoencoderConfig(RunConfig):
    """Settings of ``scripts/train_autoencoder.py``."""

    batch_size: int = option(64, "scenes per process")
    vae_config: str = option("configs/gspn2-emoji-vae.json", "AutoencoderKL configuration")
    init_from: str | None = option(None, "AutoencoderKL folder to start from, grown to fit")
    objects: int = option(3, "most objects in a scene")
    l1_weight: float = option(1.0, "mean absolute error")
    l2_weight: float = option(2.0, "mean squared error")
    edge_weight: float = option(1.0, "absolute error of the picture gradients at several scales")
    ssim_weight: float = option(0.1, "one minus structural similarity")
    kl_weight: float = option(1e-6, "Kullback-Leibler term, per latent value")
    psnr_weight: float = option(0.0, "logarithm of each picture's squared error")
    anchor_weight: float = option(0.0, "keeps the latents of `init_from`, and new channels at unit size")
    validation_scenes: int = option(128, "held-out scenes of unseen concepts")
    statistics_scenes: int = option(1024, "scenes that decide shift_factor and scaling_factor")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        super().validate()
        if self.anchor_weight and not self.init_from:
            raise ConfigError("`anchor_weight` keeps the latents of `init_from`, which is not given")


_SHARES = (
    *(f"{kind}_probability" for kind in ("pair", "triple", "group", "corner", "style", "background")),
    *(f"{kind}_probability" for kind in ("colour", "natural", "mirror")),
)


@dataclass
class DenoiserConfig(RunConfig):
    """Settings of ``scripts/train_text_to_image.py``."""

    pretrained: str | None = option(None, "folder with vae/, text_encoder/, tokenizer/ unless named apart")
    vae: str | None = option(None, "AutoencoderKL folder")
    text_encoder: str | None = option(None, "BertModel folder")
    tokenizer: str | None = option(None, "tokenizer folder")
    transformer_config: str | None = option(
        "configs/gspn2-emoji-transformer.json", "denoiser configuration; unset: that of `pretrained`"
    )
    mixer: str | None = option(None, "gspn2, softmax, linear or none in all layers instead")
    init_from: str | None = option(None, "transformer folder to start from (weights only), grown to fit")
    groups: list[str] | None = option(None, "emoji groups; unset: the default groups, `all`: every group")  # noqa: RUF009
    styles: list[str] | None = option(None, "emoji styles; unset: every style")  # noqa: RUF009
    pair_probability: float = option(0.15, "share of scenes with two objects")
    style_probability: float = option(0.85, "share of captions that name the style")
    background_probability: float = option(0.75, "share of captions that name the background")
    triple_probability: float = option(0.0, "share of scenes with three objects")
    group_probability: float = option(0.0, "share of scenes with one thing two to four times")
    corner_probability: float = option(0.0, "share of scenes with one small object in a named place")
    colour_probability: float = option(0.0, "share of things recoloured, with the colour in the caption")
    natural_probability: float = option(0.0, "share of other things whose own colour is named")
    mirror_probability: float = option(0.0, "share of things mirrored (never those with letters)")
    wobble: float = option(0.0, "largest random turn in radians; sizes and colours vary along")
    caption_layout_steps: int = option(0, "steps in which new caption layers first learn where things stand")
    caption_layout_batch: int = option(512, "captions in each of these steps")
    aspects: list[str] | None = option(None, "other shapes, height x width: 192x320 320x192")  # noqa: RUF009
    aspect_share: float = option(0.25, "share of the steps that the other shapes get")
    curated: bool = option(False, "leave out near-equal drawings that nobody asks for by name")
    keep_best: str | None = option(None, "measure (such as val_unseen_pair) whose best weights are kept too")
    max_text_tokens: int = option(32, "captions are padded and cut to this length")
    caption_dropout: float = option(0.1, "share of captions replaced by the empty one")
    data_format: str = option("auto", "auto, emoji, folder, parquet, webdataset or hub")
    data_split: str = option("train", "split of a Hub data set")
    image_column: str | None = option(None, "column of the pictures; unset: image, jpg, png, ...")
    caption_column: str | None = option(None, "column of the captions; unset: text, caption, prompt, ...")
    caption: str | None = option(None, "caption of every picture that has none")
    cache_dir: str | None = option(None, "folder for encoded pictures and captions; unset: in output_dir")
    max_aspect_ratio: float = option(2.0, "longest side over shortest of the aspect-ratio buckets")
    min_picture_side: int = option(1, "smaller pictures, in pixels, are skipped and listed")
    validation_pictures: int = option(64, "pictures held out, a tenth of all at most")
    bank_size: int = option(32768, "latents kept on each GPU for replay")
    refresh: int | None = option(None, "new scenes per step; unset: a quarter of the pictures of a step")
    prefetch: int = option(16, "caption batches made ahead of time")
    weighting: str = option("logit_normal", "logit_normal, mode or none (uniform) timesteps")
    logit_mean: float = option(0.0, "of the logit-normal timesteps")
    logit_std: float = option(1.0, "of the logit-normal timesteps")
    train_shift: float = option(1.0, "timestep shift in training")
    shift_base_resolution: int | None = option(None, "pixels; larger pictures get more shift (SD3)")
    prediction: str = option("flow", "flow, or for converted older models epsilon or v_prediction")
    min_snr_gamma: float | None = option(5.0, "of the min-SNR weights of epsilon and v_prediction")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    validation_scenes: int = option(512, "scenes per validation set")
    sheet_prompts: str | None = option("configs/sheet-prompts.json", "prompts of the picture sheets")
    sheet_steps: int = option(20, "denoising steps of the picture sheets")
    guidance_scale: float = option(4.0, "of the picture sheets")
    sampling_shift: float = option(1.0, "shift of the scheduler in the final pipeline")
    save_pipeline: bool = option(True, "write the final pipeline folder")

    def validate(self) -> None:
        """Raise `ConfigError` for the first setting that cannot work."""
        super().validate()
        _among("weighting", self.weighting, ("logit_normal", "mode", "none"))
        if self.mixer is not None:
            _among("mixer", self.mixer, ("gspn2", "softmax", "linear", "none"))
        _among("prediction", self.prediction, ("flow", "epsilon", "v_prediction"))
        _among("data_format", self.data_format, DATA_FORMATS)
        if self.max_aspect_ratio < 1.0:
            raise ConfigError(f"`max_aspect_ratio` is {self.max_aspect_ratio}; allowed: 1 or more")
        for name in (*_SHARES, "caption_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; allowed: 0 to 1")
        kinds = sum(getattr(self, f"{kind}_probability") for kind in ("pair", "triple", "group", "corner"))
        if kinds > 1.0 + 1e-9:
            raise ConfigError(f"shares of pairs, triples, groups and corners: {kinds} in all; at most 1")
        if self.pretrained is None and None in (self.vae, self.text_encoder, self.tokenizer):
            raise ConfigError("give `pretrained`, or `vae`, `text_encoder` and `tokenizer`")

    def component(self, name: str) -> Path:
        """Folder of "vae", "text_encoder" or "tokenizer"."""
        own = getattr(self, name, None)
        folder = Path(own) if own else model_folder(str(self.pretrained)) / name
        if not folder.is_dir():
            raise ConfigError(f"`{name}`: there is no folder {folder}")
        return folder


def model_folder(name: str) -> Path:
    """The folder of a pipeline: a path, or the name of an embedded model.

    Raises:
        ConfigError: there is no such folder.
    """
    from gspn2_diffusion.pipelines.model_folders import resolve_model

    try:
        return Path(resolve_model(name))
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error


Config = TypeVar("Config", bound=RunConfig)


def parse_config(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Settings from ``--config FILE`` (YAML or JSON) and ``--name value`` options, which win.

    Raises:
        ConfigError: unknown setting (the nearest valid one is named), wrong type or impossible value.
    """
    from transformers import HfArgumentParser

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", default=None, help="YAML or JSON file with settings")
    names = [item.name for item in dataclasses.fields(kind)]
    hints = typing.get_type_hints(kind)
    for action in parser._actions:
        if action.type in (int, float) and type(None) in typing.get_args(hints.get(action.dest)):
            action.type = _number_or_none(action.type)
    path = parser.parse_known_args(arguments)[0].config
    if path is not None:
        parser.set_defaults(**_checked_file(path, kind, names))
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(unknown_setting(unknown[0].lstrip("-").split("=")[0], names))
    config = kind(**{name: _unset(getattr(parsed, name), hints[name]) for name in names})
    config.validate()
    return config


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if str(path).endswith(".json"):
        found = json.loads(text)
    else:
        import yaml

        found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__}; a mapping is needed")
    return found


def _checked_file(path: str, kind: type, names: list[str]) -> dict[str, Any]:
    values = read_mapping(path)
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{path}: {unknown_setting(name, names)}")
        values[name] = _fitted(path, name, value, hints[name])
    return values


def _fitted(path: str, name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that the setting wants; YAML reads 1e-3 as text and 1 as an integer."""
    kinds = typing.get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if isinstance(value, origin) and (kind is bool or not isinstance(value, bool)):
            return value
    raise ConfigError(f"{path}: `{name}` is {value!r}; allowed: {hint}")


def _number_or_none(kind: Any) -> Any:
    """`kind` for argparse that also takes none, where a number can be left unset."""

    def number(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    number.__name__ = kind.__name__  # argparse's messages name it
    return number


def _unset(value: Any, hint: Any) -> Any:
    """None for an option given as none or null, where a setting can be left unset."""
    optional = type(None) in typing.get_args(hint)
    return None if optional and isinstance(value, str) and value.lower() in ("none", "null") else value


def unknown_setting(name: str, names: list[str]) -> str:
    """Words for a setting that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"`{name}` is no setting" + (f"; did you mean `{near[0]}`?" if near else "")


def save_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved settings as ``config.json`` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.json.part"
    partial.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
