"""LoRA files by name, and switching a pipeline between them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2_diffusion.batch.prompts import LoraNames, PromptError, parse_lora
from gspn2_diffusion.cli.console import CliError, UsageError, describe
from gspn2_diffusion.files import file_hash

if TYPE_CHECKING:
    from gspn2_diffusion.pipelines.base import GSPN2PipelineBase

SUFFIX = ".safetensors"
STANDARD_NAME = "pytorch_lora_weights.safetensors"
MOST_LOADED = 8  # adapters kept in memory, the others are loaded again when they are needed
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Lora:
    """A file of LoRA weights. ``name`` is what pictures record, never a path."""

    name: str
    path: Path
    sha256: str

    def used(self, weight: float) -> dict[str, Any]:
        """What :class:`GenerationSettings` records of it."""
        return {"name": self.name, "sha256": self.sha256, "weight": weight}


def parse_options(texts: Sequence[str] | None) -> LoraNames:
    """The values of ``--lora``.

    Raises:
        UsageError: one is not NAME or NAME:WEIGHT.
    """
    try:
        return tuple(parse_lora(text) for text in texts or ())
    except PromptError as error:
        raise UsageError(f"--lora: {error}") from None


def find_lora(name: str, folder: Path | None) -> Lora:
    """The file that ``name`` means: in ``folder``, else a path of a file or of a folder with one.

    Raises:
        CliError: there is none, or it is no safetensors file.
    """
    places = [folder / name, folder / f"{name}{SUFFIX}"] if folder and _is_plain(name) else []
    for place in [*places, Path(name)]:
        path = place / STANDARD_NAME if place.is_dir() else place
        if path.is_file() and path.suffix == SUFFIX:
            label = place.name if place.is_dir() else path.stem
            try:
                check_safetensors(path)
                return Lora(label, path, file_hash(path))
            except (OSError, ValueError) as error:
                raise CliError(f"the LoRA {name!r} cannot be read: {describe(error)}") from error
    where = f"in {str(folder)!r} or among" if folder else "among"
    raise CliError(
        f"no LoRA {name!r} {where} the files here; allowed: {SUFFIX} files, folders with {STANDARD_NAME}"
    )


def list_loras(folder: Path) -> list[Lora]:
    """Every LoRA that lies directly in ``folder``, by name: files, and folders with ``STANDARD_NAME``.

    Raises:
        CliError: no such folder, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise CliError(f"--lora-dir {str(folder)!r} is no folder")
    names = (item.name for item in sorted(folder.iterdir()) if not item.name.startswith("."))
    return [
        find_lora(name, folder)
        for name in names
        if name.endswith(SUFFIX) or (folder / name / STANDARD_NAME).is_file()
    ]


def _is_plain(name: str) -> bool:
    return name not in (".", "..") and "/" not in name and "\\" not in name


def check_safetensors(path: Path) -> None:
    """Raises ``ValueError`` unless ``path`` starts as a safetensors file with at least one tensor does."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        tensors = json.loads(header).keys() - {"__metadata__"}
    except (ValueError, AttributeError):
        tensors = set()
    if not tensors:
        raise ValueError(f"{path.name!r} is no safetensors file with weights")


def find_loras(names: Iterable[str], folder: Path | None) -> dict[str, Lora]:
    """:func:`find_lora` for each of ``names``; makes sure that peft is there if there are any.

    Raises:
        CliError: a LoRA is not there, or peft is missing.
    """
    found = {name: find_lora(name, folder) for name in dict.fromkeys(names)}
    if found:
        require_peft()
    return found


def require_peft(what: str = "LoRA") -> None:
    """Raises ``CliError`` where peft, which diffusers needs for LoRA, is not installed."""
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise CliError(f"{what} needs another package: pip install 'peft>=0.17'")


class LoraSwitch:
    """Keeps a pipeline's adapters as the next picture wants them; files are loaded when first needed.

    Args:
        pipe: without adapters of anybody else.
        files: by their hash.
    """

    def __init__(self, pipe: GSPN2PipelineBase, files: Iterable[Lora]) -> None:
        self._pipe = pipe
        self._files = {lora.sha256: lora for lora in files}
        self._loaded: dict[str, str] = {}  # hash to adapter name, the one used longest ago first
        self._failed: dict[str, str] = {}
        self._active: list[tuple[str, float]] = []

    def use(self, loras: Sequence[dict[str, Any]], few_steps: bool = False) -> None:
        """Switches to the LoRAs that a picture's settings record, in their order; to none if it is empty.

        Args:
            loras: name, hash and weight of each.
            few_steps: whether the model's own few-step adapter is on as well.

        Raises:
            ValueError: one does not fit the model, or the few-step adapter is not there.
        """
        wanted = [(lora["sha256"], float(lora["weight"])) for lora in loras]
        if len({sha for sha, _ in wanted}) < len(wanted):
            raise ValueError("the same LoRA is asked for twice")
        if few_steps != self._pipe.few_steps_enabled:
            self._switch_few_steps(few_steps)
        if wanted == self._active:
            return
        self._active = [("", 0.0)]  # not known while it changes
        for sha, _ in wanted:
            self._load(sha, keep={other for other, _ in wanted})
        if wanted:
            self._pipe.enable_lora()
            names = [self._loaded[sha] for sha, _ in wanted]
            self._pipe.set_adapters(names, [weight for _, weight in wanted])
        elif self._loaded:
            self._pipe.disable_lora()
        self._active = wanted

    def _switch_few_steps(self, on: bool) -> None:
        self._active = [("", 0.0)]  # not known while it changes
        try:
            if on:
                self._pipe.enable_few_steps()
            else:
                self._pipe.disable_few_steps()
        except (ImportError, OSError) as error:
            raise ValueError(describe(error)) from error

    def _load(self, sha: str, keep: set[str]) -> None:
        if sha in self._failed:
            raise ValueError(self._failed[sha])
        if sha in self._loaded:
            self._loaded[sha] = self._loaded.pop(sha)
            return
        self._make_room(keep)
        lora, adapter = self._files[sha], f"lora_{sha[:16]}"
        try:
            self._pipe.load_lora_weights(lora.path.parent, weight_name=lora.path.name, adapter_name=adapter)
            if adapter not in getattr(self._pipe.transformer, "peft_config", {}):
                raise ValueError("it has no weights for this model")
        except Exception as error:  # diffusers and peft raise almost anything for a file that does not fit
            self._failed[sha] = f"the LoRA {lora.name!r} cannot be used: {describe(error)}"
            raise ValueError(self._failed[sha]) from error
        self._loaded[sha] = adapter

    def _make_room(self, keep: set[str]) -> None:
        for sha in [sha for sha in self._loaded if sha not in keep]:
            if len(self._loaded) < MOST_LOADED:
                return
            self._pipe.delete_adapters(self._loaded.pop(sha))
