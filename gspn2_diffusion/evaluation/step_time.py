"""How long a training step of each compared model takes with the GPU to itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

BATCH = 128  # pictures
_TEXT_TOKENS = 24
_ROUNDS = 7


def time_steps(
    configs: Mapping[str, Mapping[str, Any]], *, batch: int = BATCH, device: str = "cuda"
) -> dict[str, float]:
    """Median milliseconds of a forward and a backward pass, by name.

    Float32 weights under autocast to bfloat16, not compiled, random inputs of the size that each
    configuration names. The models take turns, so that all meet the same machine.

    Args:
        configs: of ``GSPN2Transformer2DModel``.
        batch: pictures in a step.
        device: where to run.
    """
    steps = {name: _make_step(config, batch, torch.device(device)) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_ROUNDS + 2):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if number >= 2:  # the first steps compile kernels and fill the allocator
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _make_step(config: Mapping[str, Any], batch: int, device: torch.device) -> Callable[[], None]:
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    with device:
        model: Any = GSPN2Transformer2DModel.from_config(dict(config)).train()
        side = config["sample_size"]
        inputs = {
            "hidden_states": torch.randn(batch, config["in_channels"], side, side),
            "timestep": torch.rand(batch) * 1000,
            "encoder_hidden_states": torch.randn(batch, _TEXT_TOKENS, config["caption_channels"]),
        }
        if config.get("pooled_projection_dim"):
            inputs["pooled_projections"] = torch.randn(batch, config["pooled_projection_dim"])

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            sample = model(**inputs).sample
        sample.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step
