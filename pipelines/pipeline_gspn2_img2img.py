"""GSPN2Img2ImgPipeline: a picture drawn anew after a text, as far as ``strength`` says."""

from __future__ import annotations

from typing import Any

import torch

from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.call import CallInputs, Generators, StepCallback
from gspn2_diffusion.pipelines.image_conditioned import ImageConditionedPipeline
from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput


class GSPN2Img2ImgPipeline(ImageConditionedPipeline):
    r"""Draws pictures from a picture and text. As diffusers' ``StableDiffusion3Img2ImgPipeline``.

    Components as in :class:`GSPN2PipelineBase`; ``GSPN2Img2ImgPipeline.from_pipe(pipe)`` shares those of
    another pipeline.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.6,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | list[str] | None = "",
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
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
        r"""Draws ``B * num_images_per_prompt`` pictures after ``image``.

        Args:
            prompt: B texts, or one.
            image: one picture, or B: PIL (what is transparent becomes white), arrays ``(B, H, W, 3)`` or
                tensors ``(B, 3, H, W)`` of floats in [0, 1]; or latents ``(B, C, h, w)``.
            strength: 0 to 1, how much of the schedule runs: 0 gives the picture back (through the VAE), 1
                keeps nothing of it.
            height, width: pixels; the picture is resized to them. By default its own size, which must be a
                multiple of VAE scale x patch size.
            negative_prompt: what guidance leads away from.
            num_inference_steps: steps of the whole schedule; about ``strength`` of them run.
            timesteps, sigmas: an explicit schedule instead, of which the end is used as well.
            guidance_scale: classifier-free guidance; none when <= 1.
            generator: one for all pictures in turn, or a list with one per picture (per-image seeds).
            latents: the noise, ``(B * num_images_per_prompt, C, height / f, width / f)``.
            output_type: "pil", "np", "pt" or "latent", see :class:`GSPN2PipelineOutput`.
            return_dict: False for a tuple with the pictures as its only member.

        All other arguments are those of :class:`GSPN2Pipeline`.

        Raises:
            ValueError, TypeError: before any heavy work, naming the argument.
        """
        call = CallInputs.of(locals())
        self.check_components()
        input_checks.check_fraction("strength", strength)
        size = self.picture_call_size(image, height, width)
        images = self.begin_call(call, *size)
        pictures = self.read_call_pictures(image, *size)
        self.check_picture_count("image", pictures.shape[0], call, images)

        tensors, steps, count = self.prepare_call(call, pictures, images, size, strength)
        self.denoise(tensors, steps, count, call)
        return self.finish_call(self.decode_latents(tensors["latents"], output_type), return_dict)
