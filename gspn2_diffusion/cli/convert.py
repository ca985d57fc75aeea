"""``gspn2 convert``: a model of another family with line scans instead of self-attention."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from gspn2_diffusion.cli import options
from gspn2_diffusion.cli.console import CliError, UsageError, describe, fast_imports, quiet_libraries, say

INITS = ("attention", "random", "zero")


def convert(
    model: Annotated[str, typer.Argument(help="A pipeline or model: a folder, or a Hub id 'owner/name'.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.", readable=False)],
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", help="Names or patterns of layers to convert; all by default. May be repeated."
        ),
    ] = None,
    proxy_ratio: Annotated[
        int, typer.Option("--proxy-ratio", min=1, help="The scan runs in channels / ratio channels.")
    ] = 8,
    init: Annotated[
        str,
        typer.Option(
            "--init", help="Start of the new layers: attention (near the old ones), random or zero."
        ),
    ] = "attention",
    keep_attention: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-attention",
            help="Layers that stay as they are: a number (spread evenly), names, patterns. May be repeated.",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), fp32, bf16 or fp16.")] = "auto",
    debug: options.DebugOption = False,
) -> None:
    """Replace the self-attention of MODEL by GSPN-2 line scans and save it to OUT.

    For the UNets of Stable Diffusion 1.5 and XL and the PixArt, Sana and DiT transformers. The stock pipeline
    of the family loads the result, once gspn2_diffusion is imported. The new layers start near the old ones;
    the model needs distillation or fine-tuning before it draws well.
    """
    if init not in INITS:
        raise UsageError(f"--init must be one of {', '.join(INITS)}, got {init!r}")
    dtype = options.check_dtype(dtype)
    _check_out(out)
    with quiet_libraries():
        with fast_imports():
            import torch

            from gspn2_diffusion.conversion.convert import CONFIG_KEY, convert_to_gspn2, find_denoiser
        loading = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        try:
            converted = convert_to_gspn2(
                options.check_text("MODEL", model),
                layers=layers or "all",
                proxy_ratio=proxy_ratio,
                init=init,
                keep_attention=_kept(keep_attention),
                **loading,
            )
        except Exception as error:  # loaders raise almost anything on a damaged folder
            raise CliError(f"{model!r} cannot be converted: {describe(error)}") from error
        denoiser = find_denoiser(converted)
        _save(converted, out)
    record = denoiser.config[CONFIG_KEY]["layers"]
    say(f"{out}: {type(denoiser).__name__}, {len(record)} layers converted", sys.stdout)


def _kept(values: list[str] | None) -> list[str] | int | None:
    if values and len(values) == 1 and values[0].isdecimal():
        return int(values[0])
    return values or None


def _check_out(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CliError(f"OUT {str(out)!r} exists; name a new folder")
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"OUT {str(out)!r} cannot be made: {describe(error)}") from error
    if not os.access(parent, os.W_OK):
        raise CliError(f"OUT {str(out)!r} cannot be made: no permission to write in {str(parent)!r}")


def _bytes_of(converted: Any) -> int:
    parts = getattr(converted, "components", {"model": converted}).values()
    tensors = (t for part in parts if hasattr(part, "parameters") for t in part.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _save(converted: Any, out: Path) -> None:
    """Write into a temporary folder beside ``out`` and rename it, so that ``out`` is whole or not there."""
    parent = out.absolute().parent
    needed, free = _bytes_of(converted), shutil.disk_usage(parent).free
    if needed > free:
        raise CliError(f"OUT {str(out)!r} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:80]}.", dir=parent))
    try:
        converted.save_pretrained(temporary, safe_serialization=True)
        temporary.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        raise CliError(f"OUT {str(out)!r} cannot be written: {describe(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
