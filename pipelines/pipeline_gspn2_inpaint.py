"""GSPN2InpaintPipeline: a part of a picture drawn anew after a text."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor

from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.call import EMBEDS, CallInputs, Generators, StepCallback
from gspn2_diffusion.pipelines.image_conditioned import ImageConditionedPipeline
from gspn2_diffusion.pipelines.image_inputs import picture_size, read_mask, soften
from gspn2_diffusion.pipelines.mask_crop import MaskCrop
from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput
from gspn2_diffusion.pipelines.sampling import Tensors

MASKED = ("mask", "masked_image_latents", "image_latents", "noise")


class GSPN2InpaintPipeline(ImageConditionedPipeline):
    r"""Draws the masked part of a picture. As diffusers' ``StableDiffusion3InpaintPipeline``.

    Components as in :class:`GSPN2PipelineBase`; ``GSPN2InpaintPipeline.from_pipe(pipe)`` shares those of
    another pipeline.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", *EMBEDS, *MASKED]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: torch.Tensor | None = None,
        strength: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
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
        mask_blur: float = 0.0,
        paste_unmasked: bool = True,
    ) -> GSPN2PipelineOutput | tuple[Any]:
        r"""Draws ``B * num_images_per_prompt`` pictures that equal ``image`` outside the mask.

        Args:
            prompt: B texts, or one.
            image: one picture, or B: PIL (what is transparent becomes white), arrays ``(B, H, W, 3)`` or
                tensors ``(B, 3, H, W)`` of floats in [0, 1]; or latents ``(B, C, h, w)``.
            mask_image: one mask, or B, of the size of ``image``: PIL of the mode 1, L or RGB, or floats in
                [0, 1] with one channel. What is over one half (white) is drawn anew, by whole latents.
            masked_image_latents: ``(1 or B, C, h, w)``, the factors of the VAE applied: what stands outside
                the mask, instead of the encoded ``image``. Pixels are still pasted from ``image``.
            strength: 0 to 1, how much of the schedule runs; 1 keeps nothing under the mask.
            height, width: pixels; the picture is resized to them. By default its own size, which must be a
                multiple of VAE scale x patch size; with ``padding_mask_crop`` the training size.
            padding_mask_crop: draw only the surroundings of the mask, with so many pixels on all sides, at
                the size ``height x width``, and paste them into the picture. For one PIL picture, one PIL
                mask and the output type "pil".
            negative_prompt: what guidance leads away from.
            num_inference_steps: steps of the whole schedule; about ``strength`` of them run.
            timesteps, sigmas: an explicit schedule instead, of which the end is used as well.
            guidance_scale: classifier-free guidance; none when <= 1.
            generator: one for all pictures in turn, or a list with one per picture (per-image seeds).
            latents: the noise, ``(B * num_images_per_prompt, C, height / f, width / f)``.
            output_type: "pil", "np", "pt" or "latent", see :class:`GSPN2PipelineOutput`.
            return_dict: False for a tuple with the pictures as its only member.
            mask_blur: radius in pixels of the soft edge with which the drawn part goes into the picture.
            paste_unmasked: put the pixels outside the mask back after decoding, which loses details. Latents,
                as input or output, have no pixels to put back.

        All other arguments are those of :class:`GSPN2Pipeline`.

        Raises:
            ValueError, TypeError: before any heavy work, naming the argument.
        """
        call = CallInputs.of(locals())
        self.check_components()
        input_checks.check_fraction("strength", strength)
        check_radius(mask_blur)
        crop = None
        if padding_mask_crop is not None:
            height, width = height or self.default_size, width or self.default_size
            crop = MaskCrop.find(image, mask_image, padding_mask_crop, output_type, height, width)
            image, mask_image = crop.cut()
        size = self.picture_call_size(image, height, width)
        images = self.begin_call(call, *size)
        pictures = self.read_call_pictures(image, *size)
        self.check_picture_count("image", pictures.shape[0], call, images)
        mask = self.read_call_mask(mask_image, image, size)
        self.check_picture_count("mask_image", mask.shape[0], call, images)
        self.check_masked_latents(masked_image_latents, call, images, size)

        tensors, steps, count = self.prepare_call(call, pictures, images, size, strength)
        tensors["mask"] = self.latent_mask(self.repeat_for(images, mask)).to(tensors["noise"])
        kept = tensors["image_latents"] if masked_image_latents is None else masked_image_latents
        tensors["masked_image_latents"] = self.repeat_for(images, kept).to(tensors["noise"])
        self.denoise(tensors, steps, count, call, after_step=lambda index: self.keep_unmasked(tensors, index))
        if output_type == "latent":
            return self.finish_call(tensors["latents"], return_dict)
        pixels = self.decode_pixels(tensors["latents"])
        if paste_unmasked and crop is None and not self.is_latents(image):
            soft = self.repeat_for(images, soften(mask, mask_blur)).to(pixels)
            pixels = soft * pixels + (1 - soft) * self.repeat_for(images, pictures).to(pixels)
        drawn = self.image_processor.postprocess(pixels, output_type=output_type)
        if crop is not None:
            drawn = [crop.paste(picture, mask_blur, paste_unmasked) for picture in drawn]
        return self.finish_call(drawn, return_dict)

    def check_masked_latents(
        self, latents: Any, call: CallInputs, images: int, size: tuple[int, int]
    ) -> None:
        """Raises ``TypeError`` or ``ValueError`` unless ``latents`` is None or fits the call."""
        if latents is None:
            return
        count = latents.shape[0] if isinstance(latents, torch.Tensor) and latents.ndim else 1
        input_checks.check_latents(latents, self.latents_shape(count, *size), "masked_image_latents")
        self.check_picture_count("masked_image_latents", count, call, images)

    def read_call_mask(self, mask_image: Any, image: Any, size: tuple[int, int]) -> torch.Tensor:
        """Masks ``(B, 1, height, width)`` of 0 and 1; raises as :func:`read_mask`."""
        if mask_image is None:
            raise ValueError("`mask_image` is needed, got None")
        own = size if self.is_latents(image) else picture_size(image)
        processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )
        return read_mask(mask_image, own, *size, processor)

    def latent_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Masks ``(N, 1, H, W)`` to ``(N, 1, h, w)``: a latent is drawn anew if one of its pixels is."""
        return torch.nn.functional.max_pool2d(mask, self.vae_scale_factor)

    def keep_unmasked(self, tensors: Tensors, index: int) -> torch.Tensor:
        """The latents after step ``index``; outside the mask the picture's, with as much noise."""
        mask = tensors["mask"]
        kept = self.noised(tensors, index + 1, "masked_image_latents")
        return mask * tensors["latents"] + (1 - mask) * kept


def check_radius(value: Any) -> None:
    """Raises ``ValueError`` or ``TypeError`` unless the mask's blur is a number of pixels."""
    input_checks.check_number("mask_blur", value)
    if value < 0:
        raise ValueError(f"`mask_blur` must be at least 0 pixels, got {value}")
