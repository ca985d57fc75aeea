"""What the GSPN-2 pipelines share: components, checks of a call, and the encoding of prompts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.schedulers import SchedulerMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.pipelines import input_checks, sampling
from gspn2_diffusion.pipelines.call import EMBEDS, CallInputs
from gspn2_diffusion.pipelines.denoising import DenoisingPipeline
from gspn2_diffusion.pipelines.fast import FastDenoiserMixin
from gspn2_diffusion.pipelines.lora import GSPN2LoraLoaderMixin
from gspn2_diffusion.pipelines.sampling import Tensors
from gspn2_diffusion.pipelines.text_encoding import encode_texts, masked_mean


class GSPN2PipelineBase(DenoisingPipeline, GSPN2LoraLoaderMixin, FastDenoiserMixin):
    r"""Components of the GSPN-2 pipelines, and what a call does before it samples.

    Args:
        tokenizer, text_encoder: any tokenizer and encoder of transformers that returns ``last_hidden_state``.
        vae: ``latents = (z - shift_factor) * scaling_factor``, factors from its configuration.
        transformer: predicts the velocity ``noise - data``.
        scheduler: ``FlowMatchEulerDiscreteScheduler``, or another one set up for flow matching.
        max_sequence_length: default number of text tokens; saved with the model.
        vae_scale_factor: pixels per latent along one side; saved with the model, so that a VAE of another
            model does not go unnoticed. By default that of ``vae``.
        default_steps, default_guidance_scale: what a call uses that names none; saved with the model. Models
            of few steps need their own; for all others (None) they are 20 and 4.
        few_steps, few_steps_guidance_scale: the same with the few-step adapter that lies in the model's
            folder; None for a model without one. See :meth:`add_few_steps`.
        balance_scans: at other sizes than that of training (the transformer's ``sample_size``) line scans
            weigh as much as they did there; see :func:`~gspn2_diffusion.pipelines.low_memory.balanced_scans`.
            Saved with the model: right for one that was trained at a single size.

    Raises:
        ValueError: ``vae`` has another scale.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", *EMBEDS]

    tokenizer: Any
    text_encoder: Any

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny,
        transformer: GSPN2Transformer2DModel,
        scheduler: SchedulerMixin,
        max_sequence_length: int = 32,
        vae_scale_factor: int | None = None,
        default_steps: int | None = None,
        default_guidance_scale: float | None = None,
        few_steps: int | None = None,
        few_steps_guidance_scale: float | None = None,
        balance_scans: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = vae_scale_factor or sampling.vae_scale_factor(vae)
        self.register_to_config(
            max_sequence_length=max_sequence_length,
            vae_scale_factor=vae_scale_factor if vae is None else self.vae_scale_factor,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            few_steps=few_steps,
            few_steps_guidance_scale=few_steps_guidance_scale,
            balance_scans=balance_scans,
        )
        if vae is not None:
            self.check_scale()
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # Checks

    def check_components(self) -> None:
        """Raises ``ValueError`` for components that are missing or whose latents do not fit together."""
        for name in ("vae", "transformer", "scheduler"):
            if getattr(self, name, None) is None:
                raise ValueError(f"the pipeline has no `{name}`; load or pass one")
        latent, expected = self.vae.config.latent_channels, self.transformer.config.in_channels
        if latent != expected:
            raise ValueError(
                f"`vae` has {latent} latent channels, `transformer` expects {expected}: "
                "they belong to different models"
            )
        self.check_scale()

    def check_scale(self) -> None:
        """Raises ``ValueError`` unless the VAE has the scale that the pipeline was made with."""
        scale = sampling.vae_scale_factor(self.vae)
        if scale != self.vae_scale_factor:
            raise ValueError(
                f"`vae` makes latents {scale} times smaller than pictures, `transformer` was trained on "
                f"{self.vae_scale_factor} times smaller ones: they belong to different models"
            )

    def begin_call(self, call: CallInputs, height: int, width: int) -> int:
        """Checks everything that came, and sets the state of the call; returns the number of pictures."""
        self.check_components()
        call.fill_defaults(self.config, self.few_steps_enabled)
        call.guidance.check()
        self._guidance, self._guidance_scale = call.guidance, float(call.guidance.scale)
        self.check_cache()
        batch = self.check_text_inputs(
            call.prompt, call.negative_prompt, call.embeds, call.max_sequence_length
        )
        input_checks.check_count("num_images_per_prompt", call.num_images_per_prompt)
        images = batch * call.num_images_per_prompt
        self.check_picture_inputs(images, height, width, call.generator, call.latents)
        input_checks.check_schedule(call.num_inference_steps, call.timesteps, call.sigmas)
        input_checks.check_output_type(call.output_type)
        input_checks.check_callback(call.callback, call.callback_inputs, self._callback_tensor_inputs)
        self._attention_kwargs = call.attention_kwargs
        self._interrupt = False
        return images

    def encode_call(self, call: CallInputs, device: torch.device) -> Tensors:
        """What :meth:`encode_prompt` returns for a call, by name."""
        encoded = self.encode_prompt(
            call.prompt,
            self.do_classifier_free_guidance,
            call.negative_prompt,
            call.num_images_per_prompt,
            device,
            max_sequence_length=call.max_sequence_length,
            **call.embeds,
        )
        return dict(zip(EMBEDS, encoded, strict=True))

    def check_text_inputs(
        self, prompt: Any, negative_prompt: Any, embeds: Tensors, max_sequence_length: int | None
    ) -> int:
        """Checks prompts and embeddings (by their argument names); returns the number of prompts."""
        batch = input_checks.check_prompts(
            prompt, negative_prompt, embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
        )
        for name in ("prompt", "negative_prompt"):
            input_checks.check_embeds(
                name,
                embeds[f"{name}_embeds"],
                embeds[f"{name}_attention_mask"],
                embeds[name.replace("prompt", "pooled_prompt_embeds")],
                self.transformer.config.caption_channels,
                self.transformer.config.pooled_projection_dim,
            )
        input_checks.check_sequence_length(max_sequence_length, self.tokenizer)
        needs_text = embeds["prompt_embeds"] is None or (
            self.do_classifier_free_guidance and embeds["negative_prompt_embeds"] is None
        )
        if needs_text and (self.tokenizer is None or self.text_encoder is None):
            raise ValueError(
                "the pipeline has no `tokenizer` or no `text_encoder`; pass `prompt_embeds`, and for "
                "guidance `negative_prompt_embeds` as well"
            )
        return batch

    def check_picture_inputs(
        self, images: int, height: int, width: int, generator: Any, latents: torch.Tensor | None
    ) -> None:
        """Checks sizes in pixels, generators and starting latents of ``images`` pictures."""
        multiple = self.size_multiple
        input_checks.check_size("height", height, multiple)
        input_checks.check_size("width", width, multiple)
        input_checks.check_generator(generator, images, self._execution_device)
        input_checks.check_latents(latents, self.latents_shape(images, height, width))

    # Text

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = "",
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Encodes what did not come as embeddings, and repeats everything ``num_images_per_prompt`` times.

        Returns:
            prompt_embeds ``(N, L, C)``, prompt_attention_mask ``(N, L)``, negative_prompt_embeds,
            negative_prompt_attention_mask, pooled_prompt_embeds ``(N, C)``, negative_pooled_prompt_embeds,
            where ``N = B * num_images_per_prompt``; the negative ones are None without guidance.
        """
        device = device or self._execution_device
        positive = self._encode(
            prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds, max_sequence_length, device
        )
        negative: tuple[torch.Tensor | None, ...] = (None, None, None)
        if do_classifier_free_guidance:
            negative = self._encode(
                negative_prompt or "",
                negative_prompt_embeds,
                negative_prompt_attention_mask,
                negative_pooled_prompt_embeds,
                max_sequence_length,
                device,
            )
        rows = positive[0].shape[0] * num_images_per_prompt
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = _repeated(positive, rows)
        negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds = _repeated(
            negative, rows
        )
        # One return, of names: diffusers' tests read them out of the source.
        return (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )

    def _encode(
        self,
        texts: str | list[str] | None,
        embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
        pooled: torch.Tensor | None,
        max_sequence_length: int | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings ``(B, L, C)``, mask ``(B, L)`` and pooled vector ``(B, C)`` on ``device``."""
        if embeds is None:
            texts = [texts] if isinstance(texts, str) else list(texts or [""])
            length = max_sequence_length or min(
                self.config["max_sequence_length"], self.tokenizer.model_max_length
            )
            embeds, mask = encode_texts(texts, self.tokenizer, self.text_encoder, length, device)
        elif mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        embeds, mask = embeds.to(device), mask.to(device)
        pooled = masked_mean(embeds, mask) if pooled is None else pooled.to(device)
        return embeds, mask, pooled


def _repeated(tensors: tuple[torch.Tensor | None, ...], rows: int) -> tuple[torch.Tensor | None, ...]:
    """Each tensor with every row repeated, so that there are ``rows``."""
    return tuple(
        None if tensor is None else tensor.repeat_interleave(rows // tensor.shape[0], dim=0)
        for tensor in tensors
    )
