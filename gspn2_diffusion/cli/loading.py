"""From the name of a model to a pipeline on its device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.cli.console import CliError, debug, describe, fast_imports

if TYPE_CHECKING:
    import torch

    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline


def find_model(name: str) -> str:
    """The folder of a local or embedded model, or the Hub id as it came. Reads no weights.

    Raises:
        CliError: no such folder, or a folder that is no undamaged pipeline.
    """
    # Not `from gspn2_diffusion.pipelines import ...`: this module does without torch and diffusers.
    from gspn2_diffusion.pipelines.model_folders import check_model_folder, read_index, resolve_model

    try:
        folder = resolve_model(name)
        if os.path.isdir(folder):
            read_index(folder)  # cheap and first: reading the weights' headers imports torch
            with fast_imports():
                check_model_folder(folder)
    except (OSError, ValueError) as error:
        raise CliError(f"--model {name!r}: {describe(error)}") from error
    return folder


def display_name(name: str) -> str:
    """What a picture records as its model: an embedded name or Hub id as it is, a folder by its last part."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else name


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Without the bars diffusers and transformers draw while they read weights; downloads keep theirs."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled() and not debug()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> tuple[GSPN2Pipeline, Path]:
    """The pipeline of ``model`` (a result of :func:`find_model`) and the folder it came from.

    Raises:
        CliError: download or loading failed.
    """
    with fast_imports():
        from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

    try:
        folder = Path(model) if os.path.isdir(model) else Path(GSPN2Pipeline.download(model))
        with fast_imports(), _no_loading_bars():  # loading imports the classes of the components
            pipe = GSPN2Pipeline.from_pretrained(str(folder), dtype=dtype)
        pipe = pipe.to(device)
    except Exception as error:  # loaders raise almost anything on a damaged file
        raise CliError(f"--model {model!r} cannot be loaded: {describe(error)}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


def scheduler_settings(pipe: GSPN2Pipeline) -> tuple[str, dict[str, Any]]:
    """Class and public configuration of the pipeline's scheduler, as JSON can hold it."""
    import json

    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return type(pipe.scheduler).__name__, json.loads(json.dumps(config, default=str))
