"""``gspn2 batch``: many prompts, many pictures; may be stopped, killed and started again at any time."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gspn2_diffusion.batch import manifest, plan, prompts
from gspn2_diffusion.cli import adapters, batch_run, defaults, few_steps, options
from gspn2_diffusion.cli.console import CliError, UsageError, describe, say

NAME = "{index:05d}-{seed}"
IMAGE_FORMATS = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp"}


def batch(
    prompt_list: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS",
            help="A .txt, .jsonl or .csv file, or - for standard input.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the pictures and manifest.jsonl; made if missing.",
            show_default=False,
        ),
    ],
    input_format: Annotated[
        str, typer.Option("--input-format", help="auto (by the file's ending), txt, jsonl or csv.")
    ] = "auto",
    name: Annotated[
        str,
        typer.Option("--name", help=f"File names without ending, from {{{'}, {'.join(plan.NAME_FIELDS)}}}."),
    ] = NAME,
    image_format: Annotated[str, typer.Option("--image-format", help="png, jpg or webp.")] = "png",
    batch_size: Annotated[
        str,
        typer.Option(
            "--batch-size",
            "-b",
            help="Pictures drawn at once; halved when memory ends. auto: on a GPU the most that fit, found "
            "out while drawing; one on the CPU.",
        ),
    ] = "auto",
    model: options.ModelOption = defaults.MODEL,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=prompts.MAX_SEED,
            help="First seed of each prompt without one. By default random, and kept in the folder.",
            show_default=False,
        ),
    ] = None,
    height: options.HeightOption = None,
    width: options.WidthOption = None,
    count: options.CountOption = 1,
    negative: options.NegativeOption = "",
    few: few_steps.Option = None,
    lora: options.LoraOption = None,
    lora_dir: options.LoraDirOption = None,
    wildcards: Annotated[
        Path | None,
        typer.Option("--wildcards", help="Folder with name.txt for __name__ in prompts.", show_default=False),
    ] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="Take {a|b} and __name__ in prompts as they stand.")
    ] = False,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the plan to stdout as JSON lines, draw nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Events as JSON lines on stdout.")] = False,
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> int:
    """Draw every prompt of a list into a folder.

    Text lists have one prompt a line, with flags as in other programs: --w, --h, --s (steps), --l (guidance),
    --d (seed), --n (negative), --count, --lora, or their long names. JSON lines and CSV use the long names as
    keys. {a|b} and __name__ are resolved by the seed; <lora:name:0.8> in a prompt adds a LoRA.

    Run the same command again to go on where it stopped: finished pictures are never drawn twice, failed ones
    are tried again. Ctrl+C finishes what is in hand. The processes of
    "accelerate launch -m gspn2_diffusion batch ..." share the list, each on its own GPU.

    Exit codes: 0 all drawn, 1 error, 2 wrong usage, 3 some pictures failed, 130 interrupted.
    """
    rank, world = _process()
    few = _few_steps(few, options.check_text("--model", model), (steps, guidance, negative or None))
    steps, guidance = options.sampling(model, steps, guidance, bool(few))
    settings = plan.Defaults(
        options.check_text("--negative", negative), height, width, steps, guidance,
        seed, count, adapters.parse_options(lora), few,
    )  # fmt: skip
    entries = _read_entries(prompt_list, input_format)
    template = _usage("--name", lambda: plan.check_template(name))
    if image_format.lower() not in IMAGE_FORMATS:
        raise UsageError(f"--image-format must be png, jpg or webp, got {image_format!r}")
    suffix = IMAGE_FORMATS[image_format.lower()]
    number = _batch_size(batch_size)
    options.check_device_name(device), options.check_dtype(dtype)
    if wildcards is not None and not wildcards.is_dir():
        raise UsageError(f"--wildcards {str(wildcards)!r} is no folder")
    base = _base_seed(out, entries, seed, dry_run)
    choices = plan.Wildcards(wildcards, not literal)
    pictures = _usage("PROMPTS", lambda: plan.expand(entries, settings, base, choices))
    loras = adapters.find_loras((name for picture in pictures for name, _ in picture.loras), lora_dir)
    if dry_run:
        _show_plan(pictures, template, suffix)
        return 0
    request = batch_run.Request(
        pictures, out, template, suffix, number, options.check_text("--model", model), device,
        options.check_dtype(dtype), rank, world, loras,
    )  # fmt: skip
    return batch_run.run(request, as_json, quiet)


def _few_steps(wanted: bool | None, model: str, named: tuple[Any, ...]) -> bool | None:
    """As wanted; None where the device decides, False where it does not matter."""
    index = defaults.model_index(model)
    few_steps.check(wanted, index or None)
    without = any(value is not None for value in named) or bool(index and not index.get("few_steps"))
    return False if wanted is None and without else wanted


def _usage(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError as error:
        raise UsageError(f"{name}: {describe(error)}") from None


def _process() -> tuple[int, int]:
    """Which of how many processes this is, from the variables that accelerate and torchrun set."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE must be whole numbers") from None
    if not 0 <= rank < world:
        raise UsageError(f"RANK must be from 0 to WORLD_SIZE - 1, got {rank} of {world}")
    return rank, world


def _read_entries(source: str, form: str) -> list[prompts.Entry]:
    if form not in ("auto", *prompts.FORMATS):
        raise UsageError(f"--input-format must be auto, txt, jsonl or csv, got {form!r}")
    if source == "-" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("PROMPTS: several processes cannot share standard input; use a file")
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise CliError(f"PROMPTS {source!r} cannot be read: {error.strerror or error}") from error
    ending = Path(source).suffix.lower().removeprefix(".")
    if form == "auto" and ending in prompts.FORMATS:
        form = ending
    return _usage("PROMPTS", lambda: prompts.parse_prompts(data.decode("utf-8"), form))


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise UsageError(f"--batch-size must be auto or a whole number from 1 to 4096, got {text!r}")
    return int(text)


def _base_seed(out: Path, entries: list[prompts.Entry], seed: int | None, dry_run: bool) -> int:
    if dry_run:
        return manifest.base_seed(out, store=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "the folder is write-protected")
        needed = seed is None and any(entry.seed is None for entry in entries)
        return manifest.base_seed(out) if needed else 0
    except OSError as error:
        raise CliError(f"--out {str(out)!r} cannot be written: {error.strerror or error}") from error


def _show_plan(pictures: list[plan.Picture], template: str, suffix: str) -> None:
    """JSON lines. Null are sizes that the model decides and few steps that the device decides; a name with
    the key in it shows question marks.
    """
    for picture in pictures:
        file = plan.file_name(template, picture, None, "????????") + suffix
        say(json.dumps({**dataclasses.asdict(picture), "file": file}, ensure_ascii=False), sys.stdout)
