"""The defaults of the command line and the page, in one place."""

from __future__ import annotations

import os
from typing import Any

MODEL = "gspn2-emoji"


def sampling(model: str, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance: what is given, else what the model's folder says, else 20 and 4.

    A folder that cannot be read is no error here: loading it says what is wrong.
    """
    from gspn2_diffusion.pipelines.model_folders import own_sampling, read_index, resolve_model

    index: dict[str, Any] = {}
    try:
        folder = resolve_model(model)
        if os.path.isdir(folder):
            index = read_index(folder)
    except OSError:
        pass
    return own_sampling(index, steps, guidance)
