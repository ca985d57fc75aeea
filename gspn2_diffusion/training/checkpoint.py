"""Checkpoints as safetensors and JSON, written beside their name and renamed; and a small form to carry."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gspn2_diffusion.training.config import ConfigError

COMPACT_FILE_BYTES = 16_400_000  # below 16 MiB with the header


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged or of another model."""


def write_folder(target: Path, files: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write tensor files and ``state.json``; `target` appears only when all is on the disk.

    Raises:
        OSError: writing failed; nothing of `target` is left and what was there before stays.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, part / name)
        (part / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        replace_folder(part, target)
    except SafetensorError as error:  # how the library reports a full disk
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"cannot write {target}: {error}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def replace_folder(part: Path, target: Path) -> None:
    """Rename `part` to `target`, which may exist."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    shutil.rmtree(old, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Clear up after a process that was killed while it wrote or replaced a folder in here."""
    for old in folder.glob(".*.old"):
        target = old.with_name(old.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for part in folder.glob(".*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint or compact folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}") from error


def read_tensors(folder: Path, pattern: str) -> dict[str, Tensor]:
    """All tensors of the files that match, on the CPU.

    Raises:
        CheckpointError: no file matches, or one is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        try:
            found.update(load_file(path))
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    if not found:
        raise CheckpointError(f"{folder} holds no {pattern}")
    return found


def optimizer_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Flat names for the state of a `JointOptimizer`."""
    return {
        f"{part}.{index}.{key}": torch.as_tensor(value)
        for part, content in enumerate(state["parts"])
        for index, entry in content["state"].items()
        for key, value in entry.items()
    }


def optimizer_state(flat: Mapping[str, Tensor], current: dict[str, Any]) -> dict[str, Any]:
    """`optimizer_tensors` undone; hyper-parameters are those of the `current` state.

    Raises:
        CheckpointError: the state is of other optimisers.
    """
    parts = [{**part, "state": {}} for part in current["parts"]]
    for name, value in flat.items():
        part, index, key = name.split(".", 2)
        if int(part) >= len(parts):
            raise CheckpointError("the checkpoint is of another `optimizer`")
        parts[int(part)]["state"].setdefault(int(index), {})[key] = value
    for entry in parts:
        known = {index for group in entry["param_groups"] for index in group["params"]}
        if not set(entry["state"]) <= known:
            raise CheckpointError("the checkpoint is of another `optimizer`")
    return {"parts": parts}


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def find_resume(wanted: str, folder: Path) -> Path | None:
    """The folder to resume from: `wanted` is "none", "latest" (None when there is none yet) or a path.

    Raises:
        CheckpointError: the path is no checkpoint.
    """
    if wanted == "none":
        return None
    if wanted == "latest":
        found = checkpoints(folder)
        return found[-1] if found else None
    path = Path(wanted)
    read_state(path)
    return path


def compact_files(
    tensors: Mapping[str, Tensor], limit: int = COMPACT_FILE_BYTES
) -> dict[str, dict[str, Tensor]]:
    """bf16 copies of the tensors, in order, in files of at most `limit` bytes (one tensor at least each)."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * 2
        if groups[-1] and size + bytes_ > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor.detach().to(torch.bfloat16)
        size += bytes_
    return {f"weights-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def with_prefix(prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The named tensors under ``prefix.``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that stand under ``prefix.``, without it."""
    return {
        name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")
    }
