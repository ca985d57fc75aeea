"""The defaults of sampling on the command line, in one place; ``--help`` shows them without a model."""

from __future__ import annotations

import os

MODEL = "gspn2-emoji"
STEPS = 20
GUIDANCE = 4.0


def sampling(model: str, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance: what is given, else what the model's folder says, else 20 and 4.

    A folder that cannot be read is no error here: loading it says what is wrong.
    """
    from gspn2_diffusion.pipelines.model_folders import read_index, resolve_model

    index = {}
    try:
        folder = resolve_model(model)
        if os.path.isdir(folder):
            index = read_index(folder)
    except OSError:
        pass
    own = index.get("default_guidance_scale")
    return (
        steps or index.get("default_steps") or STEPS,
        guidance if guidance is not None else GUIDANCE if own is None else float(own),
    )
