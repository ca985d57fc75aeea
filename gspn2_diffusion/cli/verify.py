"""``gspn2 verify``: draw a picture again from the settings inside it and compare."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gspn2_diffusion.cli import options
from gspn2_diffusion.cli.adapters import Lora, LoraSwitch, find_lora, require_peft
from gspn2_diffusion.cli.console import CliError, UsageError, describe, fast_imports, quiet_libraries, say

if TYPE_CHECKING:
    import numpy as np

    from gspn2_diffusion.png_metadata import GenerationSettings

EXIT_DIFFERS = 3
TOLERANCE = 1.0


def verify(
    picture: Annotated[Path, typer.Argument(help="A picture drawn by gspn2.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The recorded name by default; for a model in a folder, the folder.",
            show_default=False,
        ),
    ] = None,
    lora: Annotated[
        list[Path] | None,
        typer.Option(
            "--lora", help="File of a LoRA that the picture was drawn with; one each.", show_default=False
        ),
    ] = None,
    lora_dir: options.LoraDirOption = None,
    device: Annotated[
        str, typer.Option("--device", help="auto (as recorded, if it is there), cpu, cuda, cuda:N or mps.")
    ] = "auto",
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance", min=0, help="Mean difference of 8-bit values up to which pictures are the same."
        ),
    ] = TOLERANCE,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
    debug: options.DebugOption = False,
) -> int:
    """Draw a picture again from the settings inside it, and say whether it is the same.

    The same is bitwise, or within --tolerance, as on another device or in another batch. What differs between
    then and now is listed: model, versions, device.

    Exit codes: 0 the same, 1 error, 2 wrong usage, 3 not the same.
    """
    from gspn2_diffusion.png_metadata import MetadataError, read_settings

    if tolerance != tolerance:
        raise UsageError("--tolerance must be a number from 0, got nan")
    options.check_device_name(device)
    try:
        settings = read_settings(picture)
    except (MetadataError, OSError) as error:
        raise CliError(describe(error)) from error
    if settings.source:
        raise CliError(f"{str(picture)!r} was drawn from another picture, which is not inside it")
    loras = _recorded_loras(settings, lora or [], lora_dir)
    if settings.few_steps:
        require_peft("a picture drawn in few steps")
    with quiet_libraries():
        before, after, now = _draw_again(picture, settings, model, device, loras)
    result = compare(before, after, tolerance)
    result["differs"] = differences(settings, now)
    if as_json:
        say(json.dumps({"file": str(picture), **result}, ensure_ascii=False), sys.stdout)
    else:
        _show(picture, result)
    return 0 if result["same"] else EXIT_DIFFERS


def _recorded_loras(settings: GenerationSettings, files: list[Path], folder: Path | None) -> list[Lora]:
    """The files of a picture's LoRAs in their order: by hash, else by name.

    Raises:
        CliError: one of them is not there.
    """
    if not settings.loras:
        return []
    given = [find_lora(str(file), None) for file in files]
    known = {lora.name: lora for lora in given} | {lora.sha256: lora for lora in given}
    found = [
        known.get(used["sha256"]) or known.get(used["name"]) or find_lora(used["name"], folder)
        for used in settings.loras
    ]
    require_peft()
    return found


def _draw_again(
    picture: Path, settings: GenerationSettings, model: str | None, device_name: str, loras: list[Lora]
) -> tuple[np.ndarray, np.ndarray, GenerationSettings]:
    """Pixels ``(H, W, 3)`` uint8 of the file and of the new picture, and the settings of the latter."""
    import dataclasses

    from gspn2_diffusion.cli import loading

    source = loading.find_model(model or settings.model)
    with fast_imports():
        import torch
    from gspn2_diffusion.cli.rendering import common_settings, draw_batch

    if device_name == "auto":
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        device_name = settings.device if there.get(settings.device) else "auto"
    device = options.resolve_device(device_name)
    dtype = options.resolve_dtype(options.check_dtype(settings.dtype), device)
    pipe, folder = loading.load_pipeline(source, device, dtype)
    used = [lora.used(old["weight"]) for lora, old in zip(loras, settings.loras, strict=True)]
    now = dataclasses.replace(
        settings, loras=used, **common_settings(pipe, folder, settings.model, device, dtype)
    )
    try:
        LoraSwitch(pipe, loras).use(used, settings.few_steps)
    except ValueError as error:
        raise CliError(describe(error)) from error
    image = draw_batch(pipe, [now]).images()[0]
    if image is None:
        raise CliError(f"the new picture has values that are not numbers in {settings.dtype}")
    return _pixels(picture), _pixels(_as_saved(image, picture.suffix.lower(), settings)), now


def _as_saved(image: Any, suffix: str, settings: GenerationSettings) -> io.BytesIO:
    """Through the same encoder as the file, so that JPEG and WebP compare like with like."""
    from gspn2_diffusion.png_metadata import SUFFIXES, save_options

    buffer = io.BytesIO()
    image.save(buffer, **save_options(suffix if suffix in SUFFIXES else ".png", settings))
    return buffer


def _pixels(source: Path | io.BytesIO) -> np.ndarray:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(source) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise CliError(f"{str(source)!r} cannot be read: {describe(error)}") from error


def compare(before: np.ndarray, after: np.ndarray, tolerance: float) -> dict[str, Any]:
    """How far two pictures ``(H, W, 3)`` uint8 are from each other.

    Returns:
        ``same`` and ``bitwise`` (bool), ``mean`` and ``max`` absolute difference in 8-bit steps (None where
        the sizes differ).
    """
    if before.shape != after.shape:
        return {"same": False, "bitwise": False, "mean": None, "max": None}
    distance = abs(before.astype("int16") - after.astype("int16"))
    mean = float(distance.mean())
    return {
        "same": mean <= tolerance,
        "bitwise": not distance.any(),
        "mean": round(mean, 4),
        "max": int(distance.max()),
    }


def differences(then: GenerationSettings, now: GenerationSettings) -> dict[str, list[str]]:
    """What is not as it was: name to [then, now]. Names: model, scheduler, device, and packages."""
    pairs = {
        "model": (then.model_hash[:10], now.model_hash[:10]),
        "scheduler": (_scheduler(then), _scheduler(now)),
        "device": (then.device_name or then.device, now.device_name or now.device),
    }
    for old, new in zip(then.loras, now.loras, strict=True):
        pairs[f"LoRA {old['name']}"] = (old["sha256"][:10], new["sha256"][:10])
    packages = sorted(then.versions.keys() | now.versions.keys())
    pairs |= {name: (then.versions.get(name, "none"), now.versions.get(name, "none")) for name in packages}
    return {name: list(pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def _scheduler(settings: GenerationSettings) -> str:
    return f"{settings.scheduler} {json.dumps(settings.scheduler_config, sort_keys=True)}"


def _show(picture: Path, result: dict[str, Any]) -> None:
    if result["bitwise"]:
        verdict = "the same, bit for bit"
    elif result["mean"] is None:
        verdict = "NOT the same: the file has another size than its settings say"
    else:
        distance = f"mean difference {result['mean']:g}, largest {result['max']} of 255"
        verdict = f"{'the same within tolerance' if result['same'] else 'NOT the same'}: {distance}"
    say(f"{picture}: {verdict}", sys.stdout)
    for name, (then, now) in result["differs"].items():
        say(f"  {name}: {then} then, {now} now", sys.stdout)
    if not result["same"] and not result["differs"]:
        say("  model, versions and device are as they were: the picture itself was changed", sys.stdout)
