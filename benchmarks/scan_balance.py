"""How well the embedded model denoises above the size that it was trained on, with its scans balanced or not.

A picture drawn at the model's own size is enlarged (bicubic), encoded, noised and denoised in a single step.
The error of the predicted latents against those of the enlarged picture is measured as it is, and of means
over 8 x 8 latents, which is what shows as stains. Writes benchmarks/results/scan-balance.json.

    python benchmarks/scan_balance.py                 on a CPU, a few minutes
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gspn2_diffusion import GSPN2SuperResPipeline
from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.pipelines.low_memory import balanced_scans

PROMPT = "a red apple, flat style, on a blue background"


def errors(
    pipe: Any, texts: tuple[Any, ...], latents: torch.Tensor, sigma: float, balanced: bool
) -> list[float]:
    """Root mean square error of the predicted latents, and of their means over 8 x 8."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    dtype = pipe.transformer.dtype
    scope = balanced_scans(pipe.transformer, *latents.shape[-2:]) if balanced else nullcontext()
    with scope:
        velocity = pipe.transformer(
            noisy.to(dtype),
            torch.tensor([1000 * sigma], device=latents.device),
            texts[0].to(dtype),
            texts[1],
            texts[4].to(dtype),
            return_dict=False,
        )[0].float()
    difference = noisy - sigma * velocity - latents
    return [float(d.square().mean().sqrt()) for d in (difference, F.avg_pool2d(difference, 8))]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--sigma", type=float, default=0.35)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scan-balance.json")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = GSPN2SuperResPipeline.from_pretrained("gspn2-emoji", dtype=torch.float32).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    own = pipe.default_size
    drawn = pipe(PROMPT, height=own, width=own, generator=generator, output_type="pt").images
    texts = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    rows = []
    for size in options.sizes:
        large = F.interpolate(drawn, size=(size, size), mode="bicubic").clamp(0, 1) * 2 - 1
        latents = pipe.encode_pixels(large.to(options.device))
        for balanced in (False, True) if size > own else (False,):
            error, coarse = errors(pipe, texts, latents, options.sigma, balanced)
            rows.append({"pixels": size, "balanced": balanced, "error": error, "error_of_means": coarse})
            print(rows[-1], flush=True)
    commit = {"commit": options.commit} if options.commit else {}
    result = {**describe_environment(), **commit, "prompt": PROMPT, "sigma": options.sigma, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(options.out)


if __name__ == "__main__":
    main()
