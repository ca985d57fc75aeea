"""What image-to-image and inpainting share: the picture's latents, and starting late in the schedule."""

from __future__ import annotations

from typing import Any

import torch

from gspn2_diffusion.pipelines import input_checks
from gspn2_diffusion.pipelines.base import GSPN2PipelineBase
from gspn2_diffusion.pipelines.call import CallInputs
from gspn2_diffusion.pipelines.image_inputs import picture_size, read_pictures
from gspn2_diffusion.pipelines.sampling import Tensors


class ImageConditionedPipeline(GSPN2PipelineBase):
    """Starts from a picture, noised as far as ``strength`` says (SDEdit, arXiv 2108.01073)."""

    _begin_index: int = 0

    def is_latents(self, image: Any) -> bool:
        """Whether ``image`` is a batch of latents ``(B, C, h, w)``, with the factors of the VAE applied."""
        channels = self.transformer.config.in_channels
        return (
            isinstance(image, torch.Tensor)
            and image.ndim == 4
            and channels != 3
            and image.shape[1] == channels
            and image.is_floating_point()
        )

    def picture_call_size(self, image: Any, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of a call: as given, else the picture's own.

        Raises:
            TypeError, ValueError: no picture, or one whose size does not fit and that is not to be resized.
        """
        if image is None:
            raise ValueError("`image` is needed, got None")
        own = picture_size(image)
        if self.is_latents(image):
            own = (own[0] * self.vae_scale_factor, own[1] * self.vae_scale_factor)
        for name, given, size in (("height", height, own[0]), ("width", width, own[1])):
            if given is None:
                input_checks.check_size(f"image.{name}", size, self.size_multiple)
        return (own[0] if height is None else height), (own[1] if width is None else width)

    def read_call_pictures(self, image: Any, height: int, width: int) -> torch.Tensor:
        """Pictures ``(B, 3, height, width)`` in [-1, 1], or latents ``(B, C, h, w)`` as they came."""
        if not self.is_latents(image):
            return read_pictures(image, height, width, self.image_processor)
        expected = self.latents_shape(image.shape[0], height, width)
        if tuple(image.shape) != expected:
            raise ValueError(f"`image` as latents must have the shape {expected}, got {tuple(image.shape)}")
        return image

    def check_picture_count(self, name: str, count: int, call: CallInputs, images: int) -> None:
        """Raises ``ValueError`` unless there is one picture, or one for every prompt."""
        prompts = images // call.num_images_per_prompt
        if count not in (1, prompts):
            raise ValueError(f"`{name}` must be one or one per prompt: {prompts} prompts came with {count}")

    def repeat_for(self, images: int, tensor: torch.Tensor) -> torch.Tensor:
        """One row, or one per prompt, to one per picture."""
        return tensor.repeat_interleave(images // tensor.shape[0], dim=0)

    def encode_pictures(self, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Pictures ``(B, 3, H, W)`` in [-1, 1] to latents ``(B, C, h, w)`` float32; latents pass.

        The mode of the VAE's distribution is taken, so the same picture has the same latents.
        """
        if pictures.shape[1] == self.transformer.config.in_channels != 3:
            return pictures.to(device, torch.float32)
        encoded = self.vae.encode(pictures.to(device, self.vae.dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        else:  # AutoencoderTiny, AutoencoderDC
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        shift = self.vae.config.get("shift_factor", None) or 0.0
        return (latents.float() - shift) * self.vae.config.scaling_factor

    def start_late(self, timesteps: torch.Tensor, count: int, strength: float) -> tuple[torch.Tensor, int]:
        """The last ``strength`` of the schedule: its timesteps and the number of its steps."""
        skipped = int(max(count - min(count * strength, count), 0))
        self._begin_index = skipped * self.scheduler.order
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(self._begin_index)
        return timesteps[self._begin_index :], count - skipped

    def noised(self, tensors: Tensors, index: int, name: str = "image_latents") -> torch.Tensor:
        """The picture's latents as noisy as those that enter step ``index`` of the call; clean at its end."""
        if index >= self._num_timesteps:
            return tensors[name]
        sigma = self.scheduler.sigmas[self._begin_index + index].to(tensors["noise"])
        return (1 - sigma) * tensors[name] + sigma * tensors["noise"]

    def prepare_call(
        self, call: CallInputs, pictures: torch.Tensor, images: int, size: tuple[int, int], strength: float
    ) -> tuple[Tensors, torch.Tensor, int]:
        """Everything that the loop needs: its tensors, its timesteps, the number of its steps."""
        device, (height, width) = self._execution_device, size
        steps, count = self.prepare_timesteps(
            call.num_inference_steps, call.timesteps, call.sigmas, height, width, device
        )
        steps, count = self.start_late(steps, count, strength)
        self._num_timesteps = len(steps)
        tensors = self.encode_call(call, device)
        latents = self.encode_pictures(pictures, device).to(device)  # the VAE may be on another one
        tensors["image_latents"] = self.repeat_for(images, latents)
        tensors["noise"] = self.prepare_latents(images, height, width, device, call.generator, call.latents)
        tensors["latents"] = self.noised(tensors, 0)
        return tensors, steps, count
