"""How the predictions with and without the prompt become one: scale, interval, rescale, or a guider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gspn2_diffusion.pipelines import input_checks

PREDICTIONS = {"pred_cond", "pred_uncond"}


@dataclass
class Guidance:
    """The guidance of one call.

    Attributes:
        scale: classifier-free guidance (arXiv 2207.12598); none when <= 1. None in a call that leaves it to
            the model.
        interval: the fractions of the steps between which guidance is on (arXiv 2404.07724): steps ``i`` of
            ``n`` with ``start <= i / n < end``.
        rescale: 0 to 1, how far the guided prediction gets the deviation of the one with the prompt
            (arXiv 2305.08891, section 3.4).
        guider: one of ``diffusers.guiders`` instead of all that, such as ``AdaptiveProjectedGuidance``.
    """

    scale: Any = 1.0  # a number as soon as `CallInputs.fill_defaults` ran
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    guider: Any = None

    def check(self) -> None:
        """Raises ``TypeError`` or ``ValueError``, naming the argument of the call."""
        input_checks.check_number("guidance_scale", self.scale)
        input_checks.check_fraction("guidance_rescale", self.rescale)
        if not isinstance(self.interval, (tuple, list)) or len(self.interval) != 2:
            raise TypeError(f"`guidance_interval` must be (start, end), got {self.interval!r}")
        for index, value in enumerate(self.interval):
            input_checks.check_fraction(f"guidance_interval[{index}]", value)
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"`guidance_interval` must not end before it starts, got {tuple(self.interval)}")
        if self.guider is not None:
            self._check_guider()

    def _check_guider(self) -> None:
        from diffusers.guiders.guider_utils import BaseGuidance

        if not isinstance(self.guider, BaseGuidance):
            raise TypeError(f"`guider` must be a guider of diffusers, got {type(self.guider).__name__}")
        extra: list[str] = sorted(set(self.guider._input_predictions or []) - PREDICTIONS)
        if extra:
            raise ValueError(
                f"`guider`={type(self.guider).__name__} needs the predictions {extra}; allowed are "
                "guiders that need only those with and without the prompt, such as AdaptiveProjectedGuidance"
            )
        if self.rescale or tuple(self.interval) != (0.0, 1.0):
            raise ValueError(
                "`guidance_rescale` and `guidance_interval` do not go with `guider`; set the guider's own "
                "`guidance_rescale`, `start` and `stop`"
            )

    def covers(self, step: int, steps: int) -> bool:
        """Whether guidance is on in ``step`` of ``steps``."""
        return self.interval[0] <= step / steps < self.interval[1]

    def combine(self, without: torch.Tensor, with_prompt: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction, in the shape ``(N, C, h, w)`` of both."""
        guided = without + scale * (with_prompt - without)
        if not self.rescale:
            return guided
        from diffusers.guiders.guider_utils import rescale_noise_cfg  # a slow import that few calls need

        return rescale_noise_cfg(guided, with_prompt, self.rescale)


def apply_guider(
    guider: Any,
    transformer: Any,
    predict: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    tensors: dict[str, Any],
    timestep: torch.Tensor,
    step: int,
    steps: int,
) -> torch.Tensor:
    """One guided prediction ``(N, C, h, w)``, by the protocol of ``diffusers.guiders``.

    Args:
        guider: sees ``step`` of ``steps``, keeps its own state between steps and resets it in step 0.
        transformer: the guider may put hooks on it for a prediction.
        predict: the name of the prediction, embeddings, mask and pooled vector to a prediction.
        tensors: holds all three, with and without ``negative_`` in front.
        timestep: of the scheduler.
    """
    guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    batches = guider.prepare_inputs({name: (tensors[name], tensors[f"negative_{name}"]) for name in names})
    for batch in batches:
        guider.prepare_models(transformer)
        kind = getattr(batch, guider._identifier_key)
        batch.noise_pred = predict(kind, *(getattr(batch, name) for name in names))
        guider.cleanup_models(transformer)
    return guider(batches).pred
