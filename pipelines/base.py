"""What the GSPN-2 pipelines share: components, loading, and the named steps of sampling."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel
from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.lora import GSPN2LoraLoaderMixin
from gspn2_diffusion.pipelines.model_folders import check_model_folder, remove_local_paths, resolve_model
from gspn2_diffusion.pipelines.sampling import Tensors, conditioning, dynamic_shift_mu, vae_scale_factor
from gspn2_diffusion.pipelines.text_encoding import encode_texts, masked_mean

Pictures = list[PIL.Image.Image] | np.ndarray | torch.Tensor

# What `encode_prompt` returns, in this order; the names are those of the pipelines' arguments.
ENCODED = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class GSPN2PipelineBase(DiffusionPipeline, GSPN2LoraLoaderMixin):
    r"""Components, loading and sampling steps of the GSPN-2 pipelines.

    Args:
        tokenizer, text_encoder: any tokenizer and encoder of transformers that returns ``last_hidden_state``.
        vae: ``latents = (z - shift_factor) * scaling_factor``, factors from its configuration.
        transformer: predicts the velocity ``noise - data``.
        scheduler: ``FlowMatchEulerDiscreteScheduler``, or another one set up for flow matching.
        max_sequence_length: default number of text tokens; saved with the model.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", *ENCODED]

    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any
    _guidance_scale: float = 1.0
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny,
        transformer: GSPN2Transformer2DModel,
        scheduler: SchedulerMixin,
        max_sequence_length: int = 32,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(max_sequence_length=max_sequence_length)
        self.vae_scale_factor = vae_scale_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # Loading and saving

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """As ``DiffusionPipeline.from_pretrained``, from safetensors only.

        ``"gspn2-emoji"`` is the model inside the package, unless a local folder has that name. Other names go
        to diffusers unchanged.

        Raises:
            ValueError: ``use_safetensors=False``.
            FileNotFoundError: no such folder, or a part of it is missing.
            OSError: a damaged folder, or a name that is neither a folder nor a reachable or cached Hub model.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors` must be True: weights are never unpickled, got False")
        name = resolve_model(pretrained_model_name_or_path)
        if os.path.isdir(name):
            check_model_folder(name, passed=kwargs)
            return super().from_pretrained(name, use_safetensors=True, **kwargs)
        try:
            return super().from_pretrained(name, use_safetensors=True, **kwargs)
        except OSError as error:
            raise OSError(
                f"`pretrained_model_name_or_path`={name!r} is neither a local folder (looked for "
                f"{os.path.abspath(name)}), nor an embedded model, and the Hub did not give it: {error}"
            ) from error

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As ``DiffusionPipeline.save_pretrained``, safetensors only; ``max_shard_size`` cuts into shards."""
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are never pickled, got False")
        super().save_pretrained(save_directory, safe_serialization=True, **kwargs)
        remove_local_paths(save_directory)

    # State of a call, as diffusers' callbacks expect it

    @property
    def guidance_scale(self) -> float:
        """Guidance of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step runs the denoiser with and without the prompt."""
        return self._guidance_scale > 1.0

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Passed to the transformer; ``{"scale": s}`` weighs LoRA layers."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of denoiser calls of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

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

    @property
    def size_multiple(self) -> int:
        """Heights and widths are multiples of this many pixels: VAE scale x patch size."""
        return int(self.vae_scale_factor * self.transformer.config.patch_size)

    @property
    def default_size(self) -> int:
        """Height and width in pixels that the transformer was trained for."""
        return int(self.vae_scale_factor * self.transformer.config.sample_size)

    def latents_shape(self, images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(images, C, height / f, width / f)``."""
        scale = self.vae_scale_factor
        return (images, self.transformer.config.in_channels, height // scale, width // scale)

    # Sampling: schedule, encode, noise, denoise, decode

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        timesteps: list[int] | None,
        sigmas: list[float] | None,
        height: int,
        width: int,
        device: torch.device,
    ) -> tuple[torch.Tensor, int]:
        """Sets the scheduler; returns its timesteps and the number of steps.

        Without an explicit schedule, the Euler scheduler gets sigmas 1, 1 - 1/n, ..., 1/n: its own default
        ends just above zero and spends a whole step there.

        Raises:
            ValueError: the scheduler takes no explicit timesteps or sigmas.
        """
        options: dict[str, Any] = {}
        if self.scheduler.config.get("use_dynamic_shifting", False):
            tokens = (height // self.size_multiple) * (width // self.size_multiple)
            options["mu"] = dynamic_shift_mu(self.scheduler.config, tokens)
        if (
            timesteps is None
            and sigmas is None
            and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        ):
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps).tolist()
        return retrieve_timesteps(self.scheduler, num_inference_steps, device, timesteps, sigmas, **options)

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
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = self._encode(
            prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds, max_sequence_length, device
        )
        batch = prompt_embeds.shape[0]
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = (
            tensor.repeat_interleave(num_images_per_prompt, dim=0)
            for tensor in (prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        )
        if not do_classifier_free_guidance:
            return prompt_embeds, prompt_attention_mask, None, None, pooled_prompt_embeds, None
        negative = self._encode(
            negative_prompt or "",
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
            max_sequence_length,
            device,
        )
        negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds = (
            tensor.repeat_interleave(num_images_per_prompt * (batch // tensor.shape[0]), dim=0)
            for tensor in negative
        )
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

    def prepare_latents(
        self,
        images: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise, or the given latents, ``(images, C, height / f, width / f)`` float32 on ``device``.

        Latents stay float32 through the whole loop, whatever the denoiser computes in.
        """
        if latents is None:
            shape = self.latents_shape(images, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32)

    def denoise(
        self,
        tensors: Tensors,
        timesteps: torch.Tensor,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: list[str] | tuple[str, ...],
    ) -> None:
        """Runs the scheduler over ``timesteps``; replaces ``tensors["latents"]`` after every step."""
        self._num_timesteps = len(timesteps)
        order = self.scheduler.order
        step_options: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = generator
        with self.progress_bar(total=num_inference_steps) as progress:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                velocity = self.predict_velocity(tensors, timestep)
                tensors["latents"] = self.scheduler.step(
                    velocity, timestep, tensors["latents"], **step_options
                )[0]
                if callback is not None:
                    shown = {name: tensors[name] for name in callback_inputs}
                    changed = callback(self, index, timestep, shown) or {}
                    tensors.update({name: changed[name] for name in changed if name in tensors})
                if index == len(timesteps) - 1 or (index + 1) % order == 0:
                    progress.update()

    def predict_velocity(self, tensors: Tensors, timestep: torch.Tensor) -> torch.Tensor:
        """The guided velocity ``(N, C, h, w)`` float32 at one timestep, conditioned on ``tensors``."""
        latents, dtype = tensors["latents"], self.transformer.dtype
        guided = self.do_classifier_free_guidance
        embeds, mask, pooled = conditioning(tensors, guided)
        inputs = torch.cat([latents, latents]) if guided else latents
        wants_pooled = self.transformer.config.pooled_projection_dim is not None
        velocity = self.transformer(
            inputs.to(dtype),
            timestep=timestep.expand(inputs.shape[0]).to(inputs.device),
            encoder_hidden_states=embeds.to(dtype),
            encoder_attention_mask=mask,
            pooled_projections=pooled.to(dtype) if wants_pooled else None,
            attention_kwargs=self.attention_kwargs,
            return_dict=False,
        )[0].float()
        if velocity.shape[1] == 2 * latents.shape[1]:  # a model that also predicts a variance
            velocity = velocity.chunk(2, dim=1)[0]
        if not guided:
            return velocity
        without, with_prompt = velocity.chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Pictures:
        """Latents ``(N, C, h, w)`` to pictures of ``output_type``; latents as they are for "latent"."""
        if output_type == "latent":
            return latents
        shift = self.vae.config.get("shift_factor", None) or 0.0
        latents = latents / self.vae.config.scaling_factor + shift
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(pictures.float(), output_type=output_type)
