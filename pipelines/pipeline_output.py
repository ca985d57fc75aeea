"""What the pipelines return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

Pictures = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class GSPN2PipelineOutput(BaseOutput):
    """The pictures of one call.

    Attributes:
        images: By ``output_type``: ``"pil"`` a list of ``N = B * num_images_per_prompt`` RGB pictures,
            ``"np"`` an array ``(N, H, W, 3)`` float32 in [0, 1], ``"pt"`` a tensor ``(N, 3, H, W)`` float32
            in [0, 1], ``"latent"`` the final latents ``(N, C, H / f, W / f)`` float32.
    """

    images: Pictures
