"""The defaults of the command line and the page, in one place."""

from __future__ import annotations

import os
from typing import Any

MODEL = "gspn2-emoji"


def model_index(model: str) -> dict[str, Any]:
    """What the index in a model's folder says; empty for a model that is not on this machine.

    A folder that cannot be read is no error here: loading it says what is wrong.
    """
    from gspn2_diffusion.pipelines.model_folders import read_index, resolve_model

    try:
        folder = resolve_model(model)
        return read_index(folder) if os.path.isdir(folder) else {}
    except OSError:
        return {}


def sampling(
    model: str, steps: int | None, guidance: float | None, few_steps: bool = False
) -> tuple[int, float]:
    """Steps and guidance: what is given, else what the model's folder says, else 20 and 4.

    With ``few_steps`` the folder is asked for those of its few-step adapter.
    """
    from gspn2_diffusion.pipelines.model_folders import own_sampling

    return own_sampling(model_index(model), steps, guidance, few_steps)
