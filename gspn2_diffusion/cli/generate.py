"""``gspn2 generate``: one prompt, one or several pictures."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gspn2_diffusion.batch.prompts import MAX_SEED
from gspn2_diffusion.cli import adapters, defaults, few_steps, options
from gspn2_diffusion.cli.console import (
    CliError,
    UsageError,
    describe,
    err_console,
    fast_imports,
    quiet_libraries,
)
from gspn2_diffusion.cli.rendering import common_settings, draw_batch

if TYPE_CHECKING:
    from PIL.Image import Image

    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.png_metadata import GenerationSettings

MAX_RANDOM_SEED = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """The checked command line. ``steps`` and ``guidance`` are without few steps, ``named`` as given."""

    prompt: str
    negative: str
    model: str
    paths: list[Path]
    steps: int
    guidance: float
    seed: int
    height: int | None
    width: int | None
    device: str
    dtype: str
    loras: list[tuple[adapters.Lora, float]]
    few: bool | None
    named: tuple[int | None, float | None]
    quiet: bool


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            readable=False,  # it is written, not read
            help="PNG file to write. Missing folders are made, an existing file is replaced. "
            "With --count, out.png becomes out-0001.png, out-0002.png, ...",
            show_default=False,
        ),
    ],
    model: options.ModelOption = defaults.MODEL,
    steps: options.StepsOption = None,
    guidance: options.GuidanceOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            max=MAX_SEED,
            help="Same seed, same picture. Random (and recorded in the file) when not given.",
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
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    quiet: options.QuietOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Draw PROMPT into a PNG file.

    The file carries its settings, so the same command draws the same picture. Each file's name is written to
    standard output when the picture is finished.
    """
    named = (steps, guidance)
    few_steps.check(few, defaults.model_index(options.check_text("--model", model)) or None)
    steps, guidance = options.sampling(model, steps, guidance)
    request = Request(
        prompt=_check_prompt(prompt),
        negative=options.check_text("--negative", negative),
        model=model,
        paths=options.output_paths(output, count),
        steps=steps,
        guidance=guidance,
        seed=_check_seed(seed, count),
        height=height,
        width=width,
        device=options.check_device_name(device),
        dtype=options.check_dtype(dtype),
        loras=_find_loras(lora, lora_dir),
        few=few,
        named=named,
        quiet=quiet,
    )
    options.check_writable(request.paths)
    with quiet_libraries(), Screen(quiet) as screen:
        for path in _draw(request, screen):
            screen.finished(path)


def _check_prompt(prompt: str) -> str:
    if not prompt.strip():
        raise UsageError("PROMPT is empty; say what to draw")
    return options.check_text("PROMPT", prompt)


def _find_loras(texts: list[str] | None, folder: Path | None) -> list[tuple[adapters.Lora, float]]:
    names = adapters.parse_options(texts)
    found = adapters.find_loras([name for name, _ in names], folder)
    return [(found[name], weight) for name, weight in names]


def _check_seed(seed: int | None, count: int) -> int:
    if seed is None:
        return secrets.randbelow(MAX_RANDOM_SEED + 1)
    if seed + count - 1 > MAX_SEED:
        raise UsageError(f"--seed {seed} + --count {count} passes the largest seed, {MAX_SEED}")
    return seed


class Screen:
    """The progress bar on stderr and the names of finished files on stdout, which may be one terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = err_console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # A file or a pipe gets no bar, so that an error stays the only line on stderr. What is written to
        # stdout is not redirected: rich would send it to stderr.
        self._progress = Progress(
            *columns,
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._quiet = quiet

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int = 0, total: int | None = None) -> None:
        """What is being done and how far; ``total`` is None while it is not known how long it takes."""
        if total is not None and done == 0:
            self._progress.reset(self._task, total=total)  # restarts the clock
        self._progress.update(self._task, description=what, completed=done, total=total)

    def finished(self, path: Path) -> None:
        """Write the name of a file to stdout, on a line of its own."""
        if self._quiet:
            return
        self._progress.stop()  # takes the bar off the screen
        typer.echo(str(path))
        self._progress.start()


def _draw(request: Request, screen: Screen) -> Iterator[Path]:
    """Load, then draw and save one picture after the other; yields each finished file."""
    from gspn2_diffusion.cli import loading
    from gspn2_diffusion.png_metadata import save_png

    source = loading.find_model(request.model)
    screen.show(f"loading {loading.display_name(request.model)}")
    with fast_imports():
        import torch

    device = options.resolve_device(request.device)
    dtype = options.resolve_dtype(request.dtype, device)
    pipe, folder = loading.load_pipeline(source, device, dtype)
    request, few = _resolve_few_steps(pipe, request, device.type)
    height, width = _resolve_size(pipe, request)
    common = common_settings(pipe, folder, loading.display_name(request.model), device, dtype)
    settings = dataclasses.replace(_settings(request, height, width, common), few_steps=few)
    try:
        adapters.LoraSwitch(pipe, [lora for lora, _ in request.loras]).use(settings.loras, few)
    except ValueError as error:
        raise CliError(f"{'--lora: ' if request.loras else ''}{describe(error)}") from error
    for number, path in enumerate(request.paths):
        current = dataclasses.replace(settings, seed=request.seed + number)
        label = "drawing" if len(request.paths) == 1 else f"picture {number + 1}/{len(request.paths)}"
        screen.show(label, 0, request.steps)
        try:
            image = render(pipe, current, functools.partial(screen.show, label, total=request.steps))
        except torch.OutOfMemoryError as error:
            raise CliError(
                f"{device} has not enough memory for {width}x{height} pixels in {current.dtype}; "
                "use a smaller --height and --width, or --dtype bf16"
            ) from error
        try:
            save_png(image, path, current)
        except OSError as error:
            raise CliError(f"{str(path)!r} cannot be written: {describe(error)}") from error
        yield path


def _resolve_few_steps(pipe: GSPN2Pipeline, request: Request, device: str) -> tuple[Request, bool]:
    """The request with the steps and guidance that are used, and whether in few steps."""
    from gspn2_diffusion.pipelines.model_folders import own_sampling

    named = any(value is not None for value in request.named) or bool(request.negative)
    if not few_steps.choose(request.few, named, pipe.config, device, request.quiet):
        return request, False
    steps, guidance = own_sampling(pipe.config, *request.named, few_steps=True)
    return dataclasses.replace(request, steps=steps, guidance=guidance), True


def _resolve_size(pipe: GSPN2Pipeline, request: Request) -> tuple[int, int]:
    """Height and width in pixels, the model's own where none was given."""
    size = {"--height": request.height or pipe.default_size, "--width": request.width or pipe.default_size}
    for option, pixels in size.items():
        if pixels % pipe.size_multiple:
            raise UsageError(
                f"{option} must be a multiple of {pipe.size_multiple} for this model, got {pixels}"
            )
    return size["--height"], size["--width"]


def _settings(request: Request, height: int, width: int, common: dict[str, Any]) -> GenerationSettings:
    from gspn2_diffusion.png_metadata import GenerationSettings

    return GenerationSettings(
        prompt=request.prompt,
        negative_prompt=request.negative,
        steps=request.steps,
        guidance_scale=request.guidance,
        seed=request.seed,
        height=height,
        width=width,
        loras=[lora.used(weight) for lora, weight in request.loras],
        **common,
    )


def render(pipe: GSPN2Pipeline, settings: GenerationSettings, on_step: Callable[[int], None]) -> Image:
    """One picture from resolved settings: the same function for everything that must draw the same picture.

    Args:
        pipe: on its device, in its dtype.
        settings: ``seed`` seeds a CPU generator, so that every device starts from the same noise.
        on_step: called with the number of finished steps.

    Raises:
        CliError: the result has values that are not numbers.
    """
    image = draw_batch(pipe, [settings], on_step).images()[0]
    if image is None:
        raise CliError(
            f"the picture has values that are not numbers in {settings.dtype}; use --dtype bf16 or fp32"
        )
    return image
