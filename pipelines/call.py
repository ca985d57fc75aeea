"""The arguments of a pipeline call that every GSPN-2 pipeline takes, in one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from gspn2_diffusion.pipelines.guidance import Guidance
from gspn2_diffusion.pipelines.sampling import Tensors

StepCallback = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
Generators = torch.Generator | list[torch.Generator]


@dataclass
class CallInputs:
    """Arguments by the names that the calls document; ``embeds`` holds the six of the embeddings."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    embeds: Tensors
    guidance: Guidance
    num_inference_steps: int
    timesteps: list[int] | None
    sigmas: list[float] | None
    num_images_per_prompt: int
    generator: Generators | None
    latents: torch.Tensor | None
    output_type: str
    attention_kwargs: dict[str, Any] | None
    callback: StepCallback | None
    callback_inputs: list[str] | tuple[str, ...]
    max_sequence_length: int | None

    def __post_init__(self) -> None:
        if isinstance(self.callback, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_inputs = self.callback.tensor_inputs
        if isinstance(self.generator, tuple):
            self.generator = list(self.generator)
