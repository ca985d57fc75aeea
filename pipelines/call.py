"""The arguments of a pipeline call that every GSPN-2 pipeline takes, in one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from gspn2_diffusion.pipelines.guidance import Guidance
from gspn2_diffusion.pipelines.model_folders import own_sampling
from gspn2_diffusion.pipelines.sampling import Tensors

StepCallback = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
Generators = torch.Generator | list[torch.Generator]

# The arguments for texts that are encoded already, in the order in which `encode_prompt` returns them.
EMBEDS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


@dataclass
class CallInputs:
    """Arguments by the names that the calls document; ``embeds`` holds the six of the embeddings."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    embeds: Tensors
    guidance: Guidance
    num_inference_steps: Any  # an integer as soon as `fill_defaults` ran
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

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> CallInputs:
        """Out of the arguments of a pipeline's call by their names, as ``locals()`` has them at its start."""
        same = [field.name for field in fields(cls) if field.name in arguments]
        return cls(
            **{name: arguments[name] for name in same},
            embeds={name: arguments[name] for name in EMBEDS},
            guidance=Guidance(
                arguments["guidance_scale"],
                arguments["guidance_interval"],
                arguments["guidance_rescale"],
                arguments["guider"],
            ),
            callback=arguments["callback_on_step_end"],
            callback_inputs=arguments["callback_on_step_end_tensor_inputs"],
        )

    def __post_init__(self) -> None:
        if isinstance(self.callback, (PipelineCallback, MultiPipelineCallbacks)):
            self.callback_inputs = self.callback.tensor_inputs
        if isinstance(self.generator, tuple):
            self.generator = list(self.generator)

    def fill_defaults(self, config: Mapping[str, Any], few_steps: bool = False) -> None:
        """Steps and guidance that the call does not name: the pipeline's own, or 20 and 4."""
        found = own_sampling(config, self.num_inference_steps, self.guidance.scale, few_steps)
        self.num_inference_steps, self.guidance.scale = found
