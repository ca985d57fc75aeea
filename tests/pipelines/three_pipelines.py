"""The three pipelines with inputs for each: the adapter to what diffusers' pipeline suites check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_img2img import GSPN2Img2ImgPipeline
from gspn2_diffusion.pipelines.pipeline_gspn2_inpaint import GSPN2InpaintPipeline

IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(11))
MASK = torch.zeros(1, 1, 16, 16)
MASK[:, :, 3:9, 4:12] = 1
PROMPT = "a red apple, flat style"


@dataclass
class Case:
    """A pipeline's class, and the inputs that go with a prompt."""

    kind: Any
    inputs: dict[str, Any]

    def build(self, **transformer: Any) -> Any:
        pipe = self.kind.from_pipe(build_tiny_pipeline(**transformer))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, count: int = 1, **changes: Any) -> dict[str, Any]:
        """A call for ``count`` prompts, with a generator for each picture."""
        images = count * changes.get("num_images_per_prompt", 1)
        settings: dict[str, Any] = {
            "prompt": PROMPT if count == 1 else [PROMPT, "a rocket", 100 * "very long "][:count],
            "generator": [torch.Generator().manual_seed(seed) for seed in range(images)],
            "num_inference_steps": 3,
            "output_type": "pt",
        }
        batched = {name: value.repeat(count, 1, 1, 1) for name, value in self.inputs.items()}
        return {**settings, **batched, **changes}

    def run(self, pipe: Any, count: int = 1, **changes: Any) -> torch.Tensor:
        return pipe(**self.arguments(count, **changes))[0]


CASES = {
    "text": Case(GSPN2Pipeline, {}),
    "image": Case(GSPN2Img2ImgPipeline, {"image": IMAGE}),
    "inpaint": Case(GSPN2InpaintPipeline, {"image": IMAGE, "mask_image": MASK}),
}
