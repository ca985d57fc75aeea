"""GSPN2Pipeline: text in, pictures out, with a GSPN-2 denoiser (arXiv 2512.07884) and flow matching."""

from __future__ import annotations

from typing import Any

import torch

from gspn2_diffusion.pipelines.base import GSPN2PipelineBase
from gspn2_diffusion.pipelines.call import CallInputs, Generators, StepCallback
from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput


class GSPN2Pipeline(GSPN2PipelineBase):
    r"""Draws pictures from text. The call follows diffusers' ``SanaPipeline``.

    Components as in :class:`GSPN2PipelineBase`; ``GSPN2Pipeline.from_pretrained("gspn2-emoji")`` loads the
    model inside the package.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        guider: Any = None,
    ) -> GSPN2PipelineOutput | tuple[Any]:
        r"""Draws ``B * num_images_per_prompt`` pictures.

        Args:
            prompt: B texts, or one. Longer ones than ``max_sequence_length`` tokens are cut with a warning.
            negative_prompt: what guidance leads away from; one for all prompts, or one each.
            num_inference_steps: scheduler steps; each runs the denoiser once (twice for Heun). By default the
                model's ``default_steps``, or 20.
            timesteps, sigmas: an explicit schedule instead, strictly descending, sigmas in (0, 1].
            guidance_scale: classifier-free guidance; none when <= 1. By default the model's
                ``default_guidance_scale``, or 4.
            height, width: pixels, multiples of VAE scale x patch size; the training size by default.
            generator: one for all pictures in turn, or a list with one per picture (per-image seeds).
            latents: starting noise ``(B * num_images_per_prompt, C, height / f, width / f)``.
            prompt_embeds: ``(B, L, caption_channels)`` instead of ``prompt``, with the mask ``(B, L)``.
            pooled_prompt_embeds: ``(B, pooled_projection_dim)``; by default the masked mean of embeddings.
            output_type: "pil", "np", "pt" or "latent", see :class:`GSPN2PipelineOutput`.
            return_dict: False for a tuple with the pictures as its only member.
            callback_on_step_end: ``callback(pipeline, step, timestep, tensors) -> tensors`` after every step.
            callback_on_step_end_tensor_inputs: which of ``_callback_tensor_inputs`` the callback gets.
            max_sequence_length: text tokens; by default the model's, at most the tokenizer's.
            guidance_interval: fractions of the steps between which guidance is on, (start, end).
            guidance_rescale: 0 to 1, takes back the contrast that guidance adds (arXiv 2305.08891).
            guider: one of ``diffusers.guiders``, such as ``AdaptiveProjectedGuidance(guidance_scale=6.0)``,
                instead of ``guidance_scale``, ``guidance_interval`` and ``guidance_rescale``.

        Raises:
            ValueError, TypeError: before any heavy work, naming the argument.
        """
        call = CallInputs.of(locals())
        self.check_components()
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        images = self.begin_call(call, height, width)
        device = self._execution_device

        steps, count = self.prepare_timesteps(
            call.num_inference_steps, timesteps, sigmas, height, width, device
        )
        tensors = self.encode_call(call, device)
        tensors["latents"] = self.prepare_latents(images, height, width, device, call.generator, latents)
        self.denoise(tensors, steps, count, call)
        return self.finish_call(self.decode_latents(tensors["latents"], output_type), return_dict)
