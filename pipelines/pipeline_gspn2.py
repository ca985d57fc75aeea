"""GSPN2Pipeline: text in, pictures out, with a GSPN-2 denoiser (arXiv 2512.07884) and flow matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.base import ENCODED, GSPN2PipelineBase, Tensors
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
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
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
        callback_on_step_end: Callable[..., dict[str, Any]]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int | None = None,
    ) -> GSPN2PipelineOutput | tuple[Any]:
        r"""Draws ``B * num_images_per_prompt`` pictures.

        Args:
            prompt: B texts, or one. Longer ones than ``max_sequence_length`` tokens are cut with a warning.
            negative_prompt: what guidance leads away from; one for all prompts, or one each.
            num_inference_steps: scheduler steps; each runs the denoiser once (twice for Heun).
            timesteps, sigmas: an explicit schedule instead, strictly descending, sigmas in (0, 1].
            guidance_scale: classifier-free guidance; none when <= 1.
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

        Raises:
            ValueError, TypeError: before any heavy work, naming the argument.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_components()
        embeds: Tensors = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        generator = list(generator) if isinstance(generator, tuple) else generator
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        input_checks.check_number("guidance_scale", guidance_scale)
        self._guidance_scale = float(guidance_scale)
        batch = self.check_text_inputs(prompt, negative_prompt, embeds, max_sequence_length)
        input_checks.check_count("num_images_per_prompt", num_images_per_prompt)
        images = batch * num_images_per_prompt
        self.check_picture_inputs(images, height, width, generator, latents)
        input_checks.check_schedule(num_inference_steps, timesteps, sigmas)
        input_checks.check_output_type(output_type)
        input_checks.check_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device = self._execution_device

        steps, count = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, height, width, device)
        encoded = self.encode_prompt(
            prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            num_images_per_prompt,
            device,
            max_sequence_length=max_sequence_length,
            **embeds,
        )
        tensors: Tensors = dict(zip(ENCODED, encoded, strict=True))
        tensors["latents"] = self.prepare_latents(images, height, width, device, generator, latents)
        self.denoise(
            tensors, steps, count, generator, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        pictures = self.decode_latents(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        return GSPN2PipelineOutput(images=pictures) if return_dict else (pictures,)
