"""From noise to pictures: the schedule, the loop over it, the guided prediction and decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.sana.pipeline_sana import retrieve_timesteps
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from gspn2_diffusion.models.caching import ONE_STATE
from gspn2_diffusion.pipelines.call import CallInputs, Generators
from gspn2_diffusion.pipelines.guidance import Guidance, apply_guider
from gspn2_diffusion.pipelines.loading import LoadablePipeline
from gspn2_diffusion.pipelines.low_memory import balanced_scans
from gspn2_diffusion.pipelines.pipeline_output import GSPN2PipelineOutput, Pictures
from gspn2_diffusion.pipelines.sampling import Tensors, conditioning, dynamic_shift_mu


class DenoisingPipeline(LoadablePipeline):
    """The steps of a call after its arguments have been checked and its prompts encoded."""

    vae: Any
    transformer: Any
    scheduler: Any
    image_processor: VaeImageProcessor
    vae_scale_factor: int
    _guidance_scale: float = 1.0
    _guidance: Guidance = Guidance()
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _cached_rows: int = 0
    _interrupt: bool = False

    # State of a call, as diffusers' callbacks expect it

    @property
    def guidance_scale(self) -> float:
        """Guidance of the running call; a callback may change ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether steps run the denoiser with and without the prompt."""
        return self._guidance_scale > 1.0 or self._guidance.guider is not None

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Passed to the transformer; ``{"scale": s}`` weighs LoRA layers."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of denoiser calls of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the running step, for the feature caches that ask for it; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt

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

    # Sampling: schedule, noise, denoise, decode

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

    def prepare_latents(
        self,
        images: int,
        height: int,
        width: int,
        device: torch.device,
        generator: Generators | None = None,
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
        call: CallInputs,
        after_step: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """Runs the scheduler over ``timesteps``; replaces ``tensors["latents"]`` after every step.

        ``after_step`` gets the index of the step and returns latents to go on with.
        """
        self._num_timesteps = len(timesteps)
        self._cached_rows = 0
        if self.cache_kind is not None:
            self.transformer._reset_stateful_cache()  # an interrupted or failed call may have left features
        order = self.scheduler.order
        step_options: dict[str, Any] = {"return_dict": False}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            step_options["generator"] = call.generator
        scans = self.scan_scope(*tensors["latents"].shape[-2:])
        with scans, self.progress_bar(total=num_inference_steps) as progress:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                velocity = self.predict_velocity(tensors, timestep, index)
                tensors["latents"] = self.scheduler.step(
                    velocity, timestep, tensors["latents"], **step_options
                )[0]
                if after_step is not None:
                    tensors["latents"] = after_step(index)
                if call.callback is not None:
                    shown = {name: tensors[name] for name in call.callback_inputs}
                    changed = call.callback(self, index, timestep, shown) or {}
                    tensors.update({name: changed[name] for name in changed if name in tensors})
                if index == len(timesteps) - 1 or (index + 1) % order == 0:
                    progress.update()
        self._current_timestep = None

    def scan_scope(self, height: int, width: int) -> AbstractContextManager[None]:
        """What surrounds the steps on latents ``height`` x ``width``: scans in balance, where asked for."""
        wanted = self.config.balance_scans
        return balanced_scans(self.transformer, height, width) if wanted else nullcontext()

    def predict_velocity(self, tensors: Tensors, timestep: torch.Tensor, index: int = 0) -> torch.Tensor:
        """The guided velocity ``(N, C, h, w)`` float32 at one timestep, conditioned on ``tensors``.

        ``index`` is that of the timestep in the running call.
        """
        latents, guidance = tensors["latents"], self._guidance
        if guidance.guider is not None:
            predict = partial(self.run_transformer, latents, timestep)
            return apply_guider(
                guidance.guider, self.transformer, predict, tensors, timestep, index, self._num_timesteps
            )
        # Both calls of one step of a second-order solver are guided, or none.
        order = self.scheduler.order
        covered = guidance.covers(index // order, -(-self._num_timesteps // order) or 1)
        guided = covered and self.do_classifier_free_guidance
        inputs = torch.cat([latents, latents]) if guided else latents
        context = "cond_uncond" if guided else "cond"
        velocity = self.run_transformer(inputs, timestep, context, *conditioning(tensors, guided))
        if not guided:
            return velocity
        return guidance.combine(*velocity.chunk(2), self.guidance_scale)

    def run_transformer(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        context: str,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        pooled: torch.Tensor,
    ) -> torch.Tensor:
        """The velocity ``(N, C, h, w)`` float32, in the transformer's dtype inside.

        ``context`` names the kind of call: feature caches keep a state for each.
        """
        dtype, wants_pooled = (
            self.transformer.dtype,
            self.transformer.config.pooled_projection_dim is not None,
        )
        with self.cache_context(context, latents.shape[0]):
            velocity = self.transformer(
                latents.to(dtype),
                timestep=timestep.expand(latents.shape[0]).to(latents.device),
                encoder_hidden_states=embeds.to(dtype),
                encoder_attention_mask=mask,
                pooled_projections=pooled.to(dtype) if wants_pooled else None,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
            )[0].float()
        # A model may also predict a variance.
        return velocity.chunk(2, dim=1)[0] if velocity.shape[1] == 2 * latents.shape[1] else velocity

    def cache_context(self, name: str, rows: int) -> AbstractContextManager[None]:
        """What a feature cache on the transformer needs to know of a call of ``rows`` pictures."""
        if self.cache_kind is None:
            return nullcontext()
        if rows != self._cached_rows:  # guidance went on or off: caches with one state have the wrong batch
            if self._cached_rows and self.cache_kind in ONE_STATE:
                self.transformer._reset_stateful_cache()
            self._cached_rows = rows
        return self.transformer.cache_context(name)

    @property
    def cache_kind(self) -> str | None:
        """The name of the configuration of the transformer's feature cache, where one is enabled."""
        config = getattr(self.transformer, "_cache_config", None)
        return None if config is None else type(config).__name__

    def check_cache(self) -> None:
        """Raises ``ValueError`` for a feature cache that cannot work with the guidance of the call."""
        guidance = self._guidance
        if self.cache_kind in ONE_STATE and guidance.guider is not None:
            raise ValueError(
                f"the cache {self.cache_kind} does not go with `guider`, which runs the denoiser several "
                "times in a step; use `guidance_scale`, or FirstBlockCacheConfig"
            )
        if self.cache_kind != "FasterCacheConfig" or self.transformer._cache_config.is_guidance_distilled:
            return
        if not self.do_classifier_free_guidance or tuple(guidance.interval) != (0.0, 1.0):
            raise ValueError(
                f"the cache FasterCacheConfig needs guidance in every step, got `guidance_scale`="
                f"{self._guidance_scale} and `guidance_interval`={tuple(guidance.interval)}; "
                "set its `is_guidance_distilled` for calls without"
            )

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Pictures:
        """Latents ``(N, C, h, w)`` to pictures of ``output_type``; latents as they are for "latent"."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_pixels(latents), output_type=output_type)

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(N, C, h, w)`` to pixels ``(N, 3, H, W)`` float32, about [-1, 1]."""
        shift = self.vae.config.get("shift_factor", None) or 0.0
        latents = latents / self.vae.config.scaling_factor + shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()

    def finish_call(self, pictures: Pictures, return_dict: bool) -> GSPN2PipelineOutput | tuple[Any]:
        """Frees what offloading left on the device; the pictures as an output or a tuple."""
        self.maybe_free_model_hooks()
        return GSPN2PipelineOutput(images=pictures) if return_dict else (pictures,)
