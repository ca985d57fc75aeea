"""What visitors may choose from: the models and LoRAs that the server was started with, by name only."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gspn2_diffusion.cli import defaults, loading
from gspn2_diffusion.cli.adapters import Lora, list_loras, require_peft
from gspn2_diffusion.cli.console import UsageError
from gspn2_diffusion.webapp.errors import AppError


@dataclass(frozen=True)
class Shelf:
    """Names to places. The first model is the one that is loaded at the start."""

    models: dict[str, str]
    loras: dict[str, Lora] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return next(iter(self.models))

    def check_model(self, name: str) -> str:
        """``name``, or the first model for an empty one; raises :class:`AppError` for any other."""
        if name and name not in self.models:
            raise AppError(f"The model must be one of: {', '.join(self.models)}.")
        return name or self.first

    def sampling(self, name: str, few_steps: bool = False) -> tuple[int, float]:
        """Steps and guidance that a model says it draws best with, else the usual ones."""
        few = few_steps and bool(self.few_steps(name))
        return defaults.sampling(self.models[name or self.first], None, None, few)

    def few_steps(self, name: str) -> int | None:
        """In how many steps a model draws with its few-step adapter; None where it cannot."""
        installed = importlib.util.find_spec("peft") is not None
        steps = defaults.model_index(self.models[name or self.first]).get("few_steps")
        return steps if installed and isinstance(steps, int) else None

    def check_lora(self, name: str) -> str:
        """``name``, which may be empty for none; raises :class:`AppError` for one that is not here."""
        if name and name not in self.loras:
            raise AppError(f"The LoRA must be one of: {', '.join(self.loras) or 'none on this server'}.")
        return name


def build_shelf(models: Sequence[str], lora_folder: Path | None = None) -> Shelf:
    """Looks every name up, before anything is loaded.

    Args:
        models: as in ``gspn2 generate --model``, at least one.
        lora_folder: all LoRAs in it are allowed.

    Raises:
        CliError: a model or LoRA is not there or damaged, or peft is missing.
        UsageError: two of them have the same name.
    """
    named: dict[str, str] = {}
    for model in models:
        name = loading.display_name(model)
        if name in named:
            raise UsageError(f"--model: two models are called {name!r}; rename a folder")
        named[name] = loading.find_model(model)
    loras = list_loras(lora_folder) if lora_folder else []
    if loras:
        require_peft()
    by_name = {lora.name: lora for lora in loras}
    if len(by_name) < len(loras):
        raise UsageError("--lora-dir has a file and a folder of the same name; rename one")
    return Shelf(named, by_name)
