"""Options that commands share, and the meaning of ``--device``, ``--dtype`` and ``--output``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gspn2_diffusion.batch.prompts import MAX_COUNT
from gspn2_diffusion.cli import defaults
from gspn2_diffusion.cli.console import CliError, UsageError, set_debug
from gspn2_diffusion.files import atomic_path

if TYPE_CHECKING:
    import torch

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}

DebugOption = Annotated[
    bool,
    typer.Option(
        "--debug",
        callback=set_debug,
        is_eager=True,
        help="Show tracebacks and the libraries' own messages (also: GSPN2_DEBUG=1).",
    ),
]

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no file names.")]

# Sampling

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="An embedded model, a folder, or a Hub id 'owner/name'.")
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        max=1000,
        help="Denoising steps. By default the model's own, 20 for most.",
        show_default=False,
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="How strictly to follow the prompt; 1 switches guidance off. By default the model's own, 4 for "
        "most.",
        show_default=False,
    ),
]
HeightOption = Annotated[
    int | None, typer.Option("--height", min=1, help="Pixels; the model's own size by default.")
]
WidthOption = Annotated[
    int | None, typer.Option("--width", min=1, help="Pixels; the model's own size by default.")
]
CountOption = Annotated[
    int,
    typer.Option(
        "--count", "-n", min=1, max=MAX_COUNT, help="Pictures of each prompt; picture k uses seed + k."
    ),
]
NegativeOption = Annotated[str, typer.Option("--negative", help="What to keep out.", show_default=False)]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME[:WEIGHT]",
        help="A LoRA file, its folder, or a name in --lora-dir; may be given several times. Needs peft.",
        show_default=False,
    ),
]
LoraDirOption = Annotated[
    Path | None,
    typer.Option("--lora-dir", help="Folder in which LoRA names are looked up.", show_default=False),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto (bf16 on a GPU that has it, else fp32), fp32, bf16 or fp16.")
]


def sampling(
    model: str, steps: int | None, guidance: float | None, few_steps: bool = False
) -> tuple[int, float]:
    """Steps and guidance of a command: those given, else the model's own, or its few-step adapter's.

    Raises:
        UsageError: the guidance is no finite number from 0.
    """
    found = defaults.sampling(model, steps, guidance, few_steps)
    return found[0], check_guidance(found[1])


def check_guidance(guidance: float) -> float:
    """``guidance`` if it is a finite number from 0.

    Raises:
        UsageError: it is not.
    """
    if not 0 <= guidance < float("inf"):
        raise UsageError(f"--guidance must be a number >= 0, got {guidance}")
    return guidance


def check_text(option: str, text: str) -> str:
    """``text`` if it can be stored as UTF-8.

    Raises:
        UsageError: it has bytes that the terminal's encoding could not decode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{option} is not valid UTF-8 text: {text!a}") from None
    return text


def check_dtype(name: str) -> str:
    """The torch name of ``--dtype``, or "auto".

    Raises:
        UsageError: unknown name.
    """
    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def check_device_name(name: str) -> str:
    """``--device`` as far as it can be judged without torch.

    Raises:
        UsageError: neither auto, cpu, mps, cuda nor cuda:N.
    """
    kind, colon, index = name.partition(":")
    well_formed = kind == "cuda" and index.isdecimal() if colon else kind in ("auto", "cpu", "cuda", "mps")
    if not well_formed:
        raise UsageError(f"--device must be auto, cpu, cuda, cuda:N or mps, got {name!r}")
    return name


def output_paths(output: Path, count: int) -> list[Path]:
    """``out.png`` for one picture, ``out-0001.png``, ``out-0002.png``, ... for several.

    Raises:
        UsageError: the name does not end in ``.png``.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output must end in .png (other formats are not supported), got {str(output)!r}")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{k:04d}{output.suffix}") for k in range(1, count + 1)]


def check_writable(paths: list[Path]) -> None:
    """Make sure that files can be written at ``paths``, all in one folder, which is made if missing.

    Raises:
        CliError: a file where a folder should be or the other way round, no permission, read-only disk.
    """
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            if path.is_dir():
                raise IsADirectoryError(f"{str(path)!r} is a folder")
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(f"{str(path)!r} exists and is write-protected")
        _try_temporary(paths[0])
    except OSError as error:
        reason = f"{error.strerror}: {error.filename!r}" if error.strerror else str(error)
        raise CliError(f"--output {str(paths[0])!r} cannot be written: {reason}") from error


def _try_temporary(path: Path) -> None:
    class Stop(Exception):
        pass

    try:
        with atomic_path(path):
            raise Stop  # leave nothing behind
    except Stop:
        pass


def resolve_device(name: str) -> torch.device:
    """The device of ``--device``. ``auto`` is the current CUDA device if torch can use one, else the CPU.

    Raises:
        CliError: the device asked for is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise CliError(f"--device {name}: torch {torch.__version__} sees {count} CUDA device(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CliError(f"--device {name}: torch {torch.__version__} sees no Apple GPU")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``--dtype``; ``auto`` is bfloat16 on GPUs that have it, else float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32
