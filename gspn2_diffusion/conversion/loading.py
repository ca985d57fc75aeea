"""From the name of a pipeline or model to the loaded object, for conversion."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def load_for_conversion(name: str | os.PathLike[str], **options: Any) -> Any:
    """A pipeline (folder with ``model_index.json``, or Hub id) or a model (folder with ``config.json``).

    Safetensors only. ``options`` go to diffusers' ``from_pretrained``, e.g. ``dtype`` and ``subfolder``; with
    a ``subfolder`` only that component of a pipeline is loaded.

    Raises:
        OSError: no such folder, nothing to load in it, or the Hub does not give it.
        ValueError: a model that diffusers does not know.
    """
    from diffusers import AutoModel, DiffusionPipeline

    text = os.fspath(name)
    if os.path.isdir(text) and not _is_pipeline(text) and "subfolder" not in options:
        return _load_model(Path(text), **options)
    loader: Any = AutoModel if "subfolder" in options else DiffusionPipeline
    try:
        return loader.from_pretrained(text, use_safetensors=True, **options)
    except OSError as error:
        raise OSError(
            f"model {text!r} is neither a local folder (looked for {os.path.abspath(text)}) nor a Hub id "
            f"that can be reached or is cached: {error}"
        ) from error


def _is_pipeline(folder: str) -> bool:
    return (Path(folder) / "model_index.json").is_file()


def _load_model(folder: Path, **options: Any) -> Any:
    import diffusers

    import gspn2_diffusion.conversion as ours

    file = folder / "config.json"
    if not file.is_file():
        raise OSError(f"model folder {str(folder)!r} holds neither model_index.json nor config.json.")
    class_name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    for library in (ours, diffusers):
        if isinstance(class_name, str) and hasattr(library, class_name):
            return getattr(library, class_name).from_pretrained(folder, use_safetensors=True, **options)
    raise ValueError(
        f"model folder {str(folder)!r}: config.json names the class {class_name!r}, not diffusers'."
    )
