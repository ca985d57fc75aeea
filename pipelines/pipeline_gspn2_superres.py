"""GSPN2SuperResPipeline: pictures of any size, drawn small and refined step by step."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from gspn2_diffusion.pipelines import input_checks, tiled_vae
from gspn2_diffusion.pipelines.call import EMBEDS, CallInputs, Generators, StepCallback
from gspn2_diffusion.pipelines.colours import ColourMap, colour_map
from gspn2_diffusion.pipelines.guidance import Guidance
from gspn2_diffusion.pipelines.image_conditioned import ImageConditionedPipeline
from gspn2_diffusion.pipelines.image_inputs import picture_size
from gspn2_diffusion.pipelines.low_memory import balanced_scans, chunked_feed_forward, one_by_one
from gspn2_diffusion.pipelines.memory_plan import (
    MemoryPlan,
    make_plan,
    measure_costs,
    memory_state,
    parse_budget,
    plan_sizes,
)
from gspn2_diffusion.pipelines.pipeline_output import Pictures
from gspn2_diffusion.pipelines.superres_checks import check_sizes, check_strength
from gspn2_diffusion.strip_files import check_disk_space, open_strip_file

logger = logging.getLogger(__name__)

_SMALL_FOR_COLOURS = 32  # latents along the longer side

STRENGTH = 0.35


@dataclass
class GSPN2SuperResOutput(BaseOutput):
    """The picture of one call.

    Attributes:
        images: One picture, as in :class:`GSPN2PipelineOutput`; None if it went into a file.
        path: The file, where one was asked for.
        plan: How memory was planned.
        sizes: Height and width in pixels of every stage.
    """

    images: Pictures | None
    path: Path | None
    plan: MemoryPlan
    sizes: list[tuple[int, int]]


class GSPN2SuperResPipeline(ImageConditionedPipeline):
    r"""Draws one picture of any size and shape: small first, then enlarged, noised and refined in stages.

    A denoiser decides on the composition at the size that it was trained for; each stage enlarges the
    picture at most twice along a side, noises it as far as ``strength`` says and denoises it again
    (SDEdit, arXiv 2108.01073). The denoiser always sees the whole picture: line scans are linear in the
    number of pixels. Only the autoencoder works in tiles, with pinned statistics and blended margins.

    Components as in :class:`GSPN2PipelineBase`; ``GSPN2SuperResPipeline.from_pipe(pipe)`` shares those of
    another pipeline.
    """

    _plan: MemoryPlan | None = None
    _balanced: bool = True
    _drawn: torch.Tensor | None = None  # the first stage in small, whose colours are kept

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        height: int = 1024,
        width: int = 1024,
        image: Any = None,
        strength: float | Sequence[float] = STRENGTH,
        negative_prompt: str | None = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        memory_budget: int | float | str | None = None,
        balance_scans: bool = True,
        keep_colours: bool = True,
        generator: Generators | None = None,
        output_type: str = "pil",
        output_path: str | os.PathLike[str] | None = None,
        output_texts: Mapping[str, str] | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        max_sequence_length: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
    ) -> GSPN2SuperResOutput | tuple[Any]:
        r"""Draws one picture of ``height x width`` pixels.

        Args:
            prompt: the text.
            height, width: pixels, any numbers from 16 up.
            image: a picture to enlarge instead of drawing the first stage; as in
                :class:`GSPN2Img2ImgPipeline`.
            strength: 0 to 1, how much of the schedule each refining stage runs; one number, or one per
                stage. 0 only enlarges.
            num_inference_steps: steps of the whole schedule.
            sizes: height and width of every stage, growing, the last ``height`` and ``width``. By default
                from the size of training (or of ``image``) on, twice as large each time.
            memory_budget: bytes, or a text like "12GB", that may be in use on the device; by default nine
                tenths of what is free. The plan made from it is logged and in the output.
            balance_scans: keep the weight that line scans had at the size of training (see
                :func:`~gspn2_diffusion.pipelines.low_memory.balanced_scans`); off for a model trained at
                many sizes.
            keep_colours: give every stage, and the decoded picture, the colours of the first stage, which
                drift otherwise (see :mod:`~gspn2_diffusion.pipelines.colours`). Latents that are asked for
                as the output are not changed at the end.
            generator: draws the noise of all stages in turn.
            output_type: "pil", "np", "pt" or "latent", see :class:`GSPN2PipelineOutput`.
            output_path: a file ending in .png, .tif or .tiff. The picture is written in strips and never in
                memory as a whole; ``images`` is None then.
            output_texts: keyword to text, stored in the file.

        All other arguments are those of :class:`GSPN2Pipeline`.

        Raises:
            ValueError, TypeError: before any heavy work, naming the argument; a picture that does not fit
                into the budget (and what would), or has values that are not numbers.
            OSError: the file cannot be written, or its disk is too small.
        """
        call = CallInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            embeds=dict.fromkeys(EMBEDS),
            guidance=Guidance(guidance_scale, guidance_interval, guidance_rescale, None),
            num_inference_steps=num_inference_steps,
            timesteps=None,
            sigmas=None,
            num_images_per_prompt=1,
            generator=generator,
            latents=None,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        stages = self._check_call(call, height, width, image, sizes)
        refined = stages[1:] if image is None else stages[1:] or stages
        strengths = check_strength(strength, len(refined))
        if output_path is not None:
            open_strip_file(output_path, width, height)  # the ending
            check_disk_space(output_path, width, height)
        self._plan = plan = self.make_plan(height, width, memory_budget, self.do_classifier_free_guidance)
        self._balanced = balance_scans
        logger.info("plan: %s", plan)
        try:
            with chunked_feed_forward(self.transformer, plan.feed_forward_tokens):
                latents = self._start(call, stages[0], image)
                self._drawn = self._in_small(latents) if keep_colours and refined else None
                for size, share in zip(refined, strengths, strict=True):
                    if not self.interrupt:
                        latents = self._refine(call, self._enlarge(latents, size), size, share)
            pictures, path = self._finish(latents, height, width, output_type, output_path, output_texts)
        finally:
            self._plan = self._drawn = None
        self.maybe_free_model_hooks()
        return GSPN2SuperResOutput(pictures, path, plan, stages) if return_dict else (pictures,)

    def make_plan(
        self,
        height: int,
        width: int,
        memory_budget: int | float | str | None = None,
        guided: bool = True,
    ) -> MemoryPlan:
        """How a picture would be computed within ``memory_budget``, with guidance or without.

        Raises:
            ValueError: it would not; says what would.
        """
        device = self._execution_device
        used, available = memory_state(device)
        budget = available if memory_budget is None else parse_budget(memory_budget)
        parts = (self.transformer, self.vae, self.text_encoder)
        absent = sum(
            p.numel() * p.element_size()
            for part in parts
            if part is not None
            for p in part.parameters()
            if p.device.type != device.type
        )
        costs = measure_costs(
            self.transformer, self.vae, self.vae_scale_factor, used + absent, device.type == "cpu"
        )
        return make_plan(costs, height, width, guided, budget)

    def _check_call(
        self, call: CallInputs, height: Any, width: Any, image: Any, sizes: Any
    ) -> list[tuple[int, int]]:
        """Checks everything but the file; returns height and width of the stages, in multiples of a token."""
        self.check_components()
        if not isinstance(call.prompt, str):
            raise TypeError(f"`prompt` must be one text, got {type(call.prompt).__name__}")
        if getattr(self, "cache_kind", None) is not None:
            raise ValueError(
                "a feature cache cannot be used across sizes; call `transformer.disable_cache()`"
            )
        multiple = self.size_multiple
        for name, value in (("height", height), ("width", width)):
            input_checks.check_count(name, value, multiple)
        if sizes is not None:
            stages = check_sizes(sizes, height, width, multiple)
        elif image is None:
            stages = plan_sizes(self.default_size, height, width, multiple)
        else:
            own = picture_size(image)
            scale = self.vae_scale_factor if self.is_latents(image) else 1
            stages = plan_sizes(round(scale * math.sqrt(own[0] * own[1])), height, width, multiple)
        self.begin_call(call, *stages[0])
        return stages

    def _start(self, call: CallInputs, size: tuple[int, int], image: Any) -> torch.Tensor:
        """Latents ``(1, C, h, w)`` of the first stage: drawn, or those of ``image``."""
        device = self._execution_device
        if image is not None:
            pictures = self.read_call_pictures(image, *size)
            if pictures.shape[0] != 1:
                raise ValueError(f"`image` must be one picture, got {pictures.shape[0]}")
            return self._encode_tiled(pictures.to(device))
        steps, count = self.prepare_timesteps(call.num_inference_steps, None, None, *size, device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        tensors = self.encode_call(call, device)
        tensors["latents"] = self.prepare_latents(1, *size, device, call.generator)
        self.denoise(tensors, steps, count, call)
        return tensors["latents"]

    def scan_scope(self, height: int, width: int) -> AbstractContextManager[None]:
        """As the other pipelines', but the call decides."""
        return balanced_scans(self.transformer, height, width) if self._balanced else nullcontext()

    def _refine(
        self, call: CallInputs, latents: torch.Tensor, size: tuple[int, int], strength: float
    ) -> torch.Tensor:
        """Noises ``latents`` as far as ``strength`` says and denoises them."""
        device = self._execution_device
        steps, count = self.prepare_timesteps(call.num_inference_steps, None, None, *size, device)
        steps, count = self.start_late(steps, count, strength)
        if not count:
            return latents
        self._num_timesteps = len(steps)
        tensors = self.encode_call(call, device)
        tensors["image_latents"] = latents
        tensors["noise"] = self.prepare_latents(1, *size, device, call.generator)
        tensors["latents"] = self.noised(tensors, 0)
        self.denoise(tensors, steps, count, call)
        return tensors["latents"]

    def run_transformer(self, latents: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """As the other pipelines', one row of the batch at a time where the plan says so."""
        run = super().run_transformer
        if self._plan is None or self._plan.guidance_together or latents.shape[0] == 1:
            return run(latents, *arguments, **options)
        return one_by_one(lambda *row: run(*row, **options), latents, *arguments)

    # The autoencoder, in tiles

    def _tile(self) -> int:
        assert self._plan is not None
        return self._plan.vae_tile

    def _pinned(self, part: str, picture: torch.Tensor, longest: int) -> Any:
        """Pinned statistics of the VAE's "encoder" or "decoder", from a picture (or latents) in small."""
        module = getattr(self.vae, part, None)
        if module is None:
            return nullcontext()
        run = self.decode_pixels if part == "decoder" else self.encode_pixels
        return tiled_vae.pinned_statistics(module, lambda: run(tiled_vae.in_small(picture, longest)))

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels ``(1, 3, H, W)`` in [-1, 1] to latents ``(1, C, h, w)`` float32, at once."""
        return self.encode_pictures(pixels, pixels.device)

    def _in_small(self, latents: torch.Tensor) -> torch.Tensor:
        """The picture ``(1, 3, h, w)`` of latents, in small."""
        return self.decode_pixels(tiled_vae.in_small(latents, _SMALL_FOR_COLOURS)).float()

    def _colours(self, latents: torch.Tensor) -> ColourMap | None:
        """What gives the picture of latents the colours of the first stage."""
        return None if self._drawn is None else colour_map(self._in_small(latents), self._drawn)

    def _enlarge(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Latents of the picture at ``size`` pixels; as they are if they have it."""
        scale = self.vae_scale_factor
        target = (size[0] // scale, size[1] // scale)
        if tuple(latents.shape[-2:]) == target:
            return latents
        tile, colours = self._tile(), self._colours(latents)

        def decode(part: torch.Tensor) -> torch.Tensor:
            pixels = self.decode_pixels(part)
            return pixels if colours is None else colours.apply_(pixels)

        small = tiled_vae.in_small(latents, tiled_vae.SMALL)
        whole = max(target) <= tile
        decoder = nullcontext() if whole else self._pinned("decoder", latents, tiled_vae.SMALL)
        with decoder:
            encoder = nullcontext() if whole else self._pinned("encoder", self.decode_pixels(small), 10**9)
            with encoder:
                return tiled_vae.upscale_tiles(decode, self.encode_pixels, latents, target, scale, tile)

    def _encode_tiled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures ``(1, 3, H, W)`` in [-1, 1], or latents as they are, to latents."""
        if self.is_latents(pixels):
            return pixels.float()
        scale, tile = self.vae_scale_factor, self._tile()
        height, width = pixels.shape[-2] // scale, pixels.shape[-1] // scale
        if max(height, width) <= tile:
            return self.encode_pixels(pixels)

        def compute(row: tiled_vae.Span, column: tiled_vae.Span) -> torch.Tensor:
            return self.encode_pixels(
                pixels[..., row.first * scale : row.last * scale, column.first * scale : column.last * scale]
            )

        with self._pinned("encoder", pixels, tiled_vae.SMALL * scale):
            return tiled_vae.map_tiles(
                compute, self.transformer.config.in_channels, height, width, tile, pixels.device
            )

    def decode_rows(self, latents: torch.Tensor, height: int, width: int) -> Iterator[np.ndarray]:
        """Rows ``(n, width, 3)`` uint8 of the picture, from the top, cut to ``height x width`` pixels.

        Raises:
            ValueError: values that are not numbers.
        """
        tile, done, colours = self._tile(), 0, self._colours(latents)
        pinned = (
            nullcontext()
            if max(latents.shape[-2:]) <= tile
            else self._pinned("decoder", latents, tiled_vae.SMALL)
        )
        with pinned:
            for strip in tiled_vae.decode_strips(self.decode_pixels, latents, self.vae_scale_factor, tile):
                if not torch.isfinite(strip).all():
                    raise ValueError(f"the picture has values that are not numbers in {self.vae.dtype}")
                strip = strip[:, : height - done, :width]
                done += strip.shape[1]
                if colours is not None:
                    colours.apply_(strip)
                rows = strip.div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_()
                yield rows.to(torch.uint8).permute(1, 2, 0).numpy()

    def _finish(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        output_type: str,
        output_path: str | os.PathLike[str] | None,
        texts: Mapping[str, str] | None,
    ) -> tuple[Pictures | None, Path | None]:
        if output_type == "latent" and output_path is None:
            return latents, None
        if output_path is not None:
            with open_strip_file(output_path, width, height, texts) as file:
                for rows in self.decode_rows(latents, height, width):
                    file.write(rows)
            return None, Path(output_path)
        pixels = np.empty((height, width, 3), np.uint8)
        done = 0
        for rows in self.decode_rows(latents, height, width):
            pixels[done : done + len(rows)] = rows
            done += len(rows)
        if output_type == "pil":
            return [PIL.Image.fromarray(pixels)], None
        floats = pixels[None].astype(np.float32) / 255
        return (floats if output_type == "np" else torch.from_numpy(floats).permute(0, 3, 1, 2)), None
