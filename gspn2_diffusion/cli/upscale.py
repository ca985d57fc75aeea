"""``gspn2 upscale``: pictures of any size, drawn small and refined in stages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gspn2_diffusion.cli import defaults, options
from gspn2_diffusion.cli.console import CliError, UsageError, describe, fast_imports, quiet_libraries, say

if TYPE_CHECKING:
    import torch

    from gspn2_diffusion.cli.generate import Screen

TEXT_KEY = "gspn2-upscale"
SUFFIXES = (".png", ".tif", ".tiff")


def upscale(
    prompt: Annotated[
        str, typer.Argument(help="What to draw, or what the picture shows.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            readable=False,
            help="File ending in .png, .tif or .tiff, written in strips. An existing file is replaced.",
            show_default=False,
        ),
    ],
    picture: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="A picture to enlarge; without one, the first stage draws it."),
    ] = None,
    height: Annotated[int, typer.Option("--height", min=1, help="Pixels of the result, any number.")] = 1024,
    width: Annotated[int, typer.Option("--width", min=1, help="Pixels of the result, any number.")] = 1024,
    strength: Annotated[
        float,
        typer.Option("--strength", min=0, max=1, help="How much each stage draws anew; 0 only enlarges."),
    ] = 0.35,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Budget such as 12GB; by default nine tenths of what is free."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done within the budget, and stop.")
    ] = False,
    model: options.ModelOption = defaults.MODEL,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=2**63 - 1, help="Same seed, same picture. Random if not given."),
    ] = None,
    negative: options.NegativeOption = "",
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Draw PROMPT at any size up to 16384 pixels and beyond, or enlarge a picture.

    The picture is drawn at the model's own size, then enlarged, noised and refined until it has the size
    asked for, twice as large each time. Memory is planned before anything is drawn; the file is written in
    strips. Its settings are stored in it.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--output must end in {', '.join(SUFFIXES)}, got {str(output)!r}")
    steps, guidance = options.sampling(options.check_text("--model", model), steps, guidance)
    settings: dict[str, Any] = {
        "prompt": _check_prompt(prompt),
        "negative_prompt": options.check_text("--negative", negative),
        "height": height,
        "width": width,
        "strength": strength,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    seed = secrets.randbelow(2**32) if seed is None else seed
    device, dtype = options.check_device_name(device), options.check_dtype(dtype)
    if picture is not None and not picture.is_file():
        raise CliError(f"--input {str(picture)!r}: no such file")
    if not plan:
        options.check_writable([output])
    from gspn2_diffusion.cli.generate import Screen

    with quiet_libraries(), Screen(quiet) as screen:
        screen.show("loading")
        pipe = _load(model, device, dtype)
        try:
            planned = pipe.make_plan(height, width, memory, guidance > 1)
        except (ValueError, TypeError) as error:
            raise CliError(describe(error)) from error
        if plan or not quiet:
            say(f"plan: {planned}")
        if plan:
            return
        record = {**settings, "seed": seed, "model": model, "input": picture.name if picture else None}
        texts = {TEXT_KEY: json.dumps(record, ensure_ascii=False)}
        call = {**settings, "image": _open(picture), "memory_budget": memory, "output_texts": texts}
        _draw(pipe, call, seed, output, screen)
        screen.finished(output)


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise UsageError("PROMPT is empty; say what to draw, or what the picture shows")
    return options.check_text("PROMPT", prompt)


def _load(model: str, device_name: str, dtype_name: str) -> Any:
    from gspn2_diffusion.cli import loading

    source = loading.find_model(model)
    with fast_imports():
        from gspn2_diffusion.pipelines.pipeline_gspn2_superres import GSPN2SuperResPipeline
    device: torch.device = options.resolve_device(device_name)
    pipe, _ = loading.load_pipeline(source, device, options.resolve_dtype(dtype_name, device))
    pipe = GSPN2SuperResPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _open(picture: Path | None) -> Any:
    if picture is None:
        return None
    from PIL import Image

    try:
        with Image.open(picture) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CliError(f"--input {str(picture)!r} cannot be read: {describe(error)}") from error


def _on_step(screen: Screen, scale: int) -> Callable[..., dict[str, Any]]:
    def show(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        height, width = (side * scale for side in tensors["latents"].shape[-2:])
        # A step count that starts anew restarts the bar.
        screen.show(f"{width} x {height}", step and step + 1, pipe.num_timesteps)
        return {}

    return show


def _draw(pipe: Any, call: dict[str, Any], seed: int, output: Path, screen: Screen) -> None:
    import torch

    try:
        pipe(
            **call,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_path=output,
            callback_on_step_end=_on_step(screen, pipe.vae_scale_factor),
        )
    except torch.OutOfMemoryError as error:
        raise CliError("the device has less memory than was planned with; set --memory") from error
    except (OSError, ValueError, TypeError) as error:
        raise CliError(describe(error)) from error
