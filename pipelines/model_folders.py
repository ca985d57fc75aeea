"""Where a model's name leads: the models inside the package, and checks of local folders before loading."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import gspn2_diffusion.checkpoints

# What a call uses that names none, with a model that has no settings of its own.
DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE = 20, 4.0
FEW_STEPS_USUAL = (4, 1.0)
EMBEDDED_MODELS = ("gspn2-emoji",)
INDEX_NAME = "model_index.json"
# Sub-folder of the few-step adapter, the adapter's reserved name, and the number of its steps in the index.
FEW_STEPS = "few_steps"
WEIGHT_NAME = "pytorch_lora_weights.safetensors"
FEW_STEPS_FILE = f"{FEW_STEPS}/{WEIGHT_NAME}"

# diffusers' name for it, without the ending. Every folder's file is copied to the same place of a cache, so
# each knows all pipelines, but names only its own (diffusers allows just one).
PIPELINE_FILE = "pipeline"
_PIPELINE_CODE = '''"""Lets diffusers load this folder by trust_remote_code=True; needs gspn2-diffusion."""

import gspn2_diffusion
from gspn2_diffusion.pipelines import {name}

__all__ = ["{name}"]

# diffusers runs this in the module of the folder that it loaded before, and wants to find one pipeline there.
for _other in [key for key in globals() if key.startswith("GSPN2") and key not in __all__]:
    del globals()[_other]


def __getattr__(name):
    return getattr(gspn2_diffusion, name)
'''


def own_sampling(
    config: Mapping[str, Any], steps: int | None, guidance_scale: float | None, few_steps: bool = False
) -> tuple[int, float]:
    """Steps and guidance scale: what is given, else those in a pipeline's configuration, else 20 and 4.

    With ``few_steps`` they are those of the model's few-step adapter, else 4 and 1.
    """
    kind, usual = (
        ("few_steps", FEW_STEPS_USUAL) if few_steps else ("default", (DEFAULT_STEPS, DEFAULT_GUIDANCE_SCALE))
    )
    if steps is None:
        steps = config.get("few_steps" if few_steps else "default_steps") or usual[0]
    if guidance_scale is None:
        own = config.get(f"{kind}_guidance_scale")
        guidance_scale = usual[1] if own is None else float(own)
    return steps, guidance_scale


def embedded_model_folder(name: str) -> Path:
    """The folder of a model that ships inside the package."""
    return Path(next(iter(gspn2_diffusion.checkpoints.__path__))) / name


def resolve_model(name: str | os.PathLike[str]) -> str:
    """Turns an embedded model's name into its folder; every other name is returned as it came.

    A local folder of the same name wins, as it does for any other name in diffusers.

    Raises:
        TypeError: ``name`` is neither a string nor a path.
        FileNotFoundError: ``name`` can only be a local path (absolute, starting with ``.`` or ``~``, a
            ``Path``, or more than one separator) and there is no such folder.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            f"`pretrained_model_name_or_path` must be a string or a path, got {type(name).__name__}"
        )
    text = os.fspath(name)
    if os.path.isdir(text):
        return text
    if text in EMBEDDED_MODELS:
        folder = embedded_model_folder(text)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`pretrained_model_name_or_path`={text!r} is the model inside the package, but its folder "
                f"{folder} is missing; reinstall gspn2-diffusion"
            )
        return str(folder)
    if _only_local(name, text):
        raise FileNotFoundError(
            f"`pretrained_model_name_or_path`={text!r}: no such folder; looked for {os.path.abspath(text)} "
            f"holding {INDEX_NAME}. Allowed are a pipeline folder, a Hub id 'owner/name', or the embedded "
            f"{', '.join(map(repr, EMBEDDED_MODELS))}"
        )
    return text


def _only_local(name: str | os.PathLike[str], text: str) -> bool:
    return (
        isinstance(name, os.PathLike)
        or os.path.isabs(text)
        or text.startswith((".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
    )


def check_model_folder(folder: str, passed: Collection[str] = ()) -> None:
    """Reads the index and the safetensors headers of a pipeline folder, so that damage shows before loading.

    Args:
        folder: An existing local folder.
        passed: Components handed over as objects, so their sub-folders are not needed.

    Raises:
        FileNotFoundError: The index or a component's sub-folder is missing.
        OSError: The index is not a JSON object, or a safetensors file is damaged or cut short.
    """
    for component in _components(read_index(folder)):
        if component in passed:
            continue
        sub_folder = Path(folder) / component
        if not sub_folder.is_dir():
            raise FileNotFoundError(
                f"model folder {folder!r}: {INDEX_NAME} names the component {component!r}, "
                f"but the sub-folder {sub_folder} is missing"
            )
        for file in sorted(sub_folder.glob("*.safetensors")):
            _check_safetensors(file)
    if (Path(folder) / FEW_STEPS_FILE).is_file():
        _check_safetensors(Path(folder) / FEW_STEPS_FILE)


def read_index(folder: str) -> dict[str, Any]:
    """``model_index.json`` of a pipeline folder as a dictionary; raises as :func:`check_model_folder`."""
    path = Path(folder) / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"model folder {folder!r} is not a pipeline folder: {INDEX_NAME} is missing; looked for {path}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"model folder {folder!r} is damaged: {path} is not valid JSON ({error})") from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise OSError(
            f"model folder {folder!r} is damaged: {path} does not describe a pipeline (no _class_name)"
        )
    return index


def _components(index: dict[str, Any]) -> list[str]:
    """Names that the index gives as ``[library, class]``, both set."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and all(value)
    ]


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except SafetensorError as error:
        raise OSError(f"the weights file {file} is damaged or cut short ({error})") from error


def remove_local_paths(folder: str | os.PathLike[str]) -> None:
    """Takes out of a saved pipeline's configurations the local folders that its parts once came from.

    diffusers writes ``_name_or_path`` of whatever was loaded; a model that is passed on should not carry the
    paths of the machine that made it. Hub ids stay.
    """
    for file in [Path(folder) / INDEX_NAME, *Path(folder).glob("*/config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        source = config.get("_name_or_path")
        if isinstance(source, str) and (_only_local(source, source) or os.path.exists(source)):
            del config["_name_or_path"]
            _write(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def class_name(index: dict[str, Any]) -> str:
    """The pipeline's class in an index, which names it alone or as ``[file, class]``."""
    value = index["_class_name"]
    return str(value[-1] if isinstance(value, (list, tuple)) and value else value)


def write_pipeline_file(folder: str | os.PathLike[str], name: str) -> None:
    """Writes ``pipeline.py`` beside a saved index, and names it there: ``["pipeline", name]``."""
    index_file, code_file = Path(folder) / INDEX_NAME, Path(folder) / f"{PIPELINE_FILE}.py"
    index = json.loads(index_file.read_text(encoding="utf-8"))
    index["_class_name"] = [PIPELINE_FILE, name]
    _write(code_file, _PIPELINE_CODE.format(name=name))
    _write(index_file, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
