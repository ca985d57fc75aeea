"""Draw fixed prompts from fixed seeds onto one labelled sheet.

python scripts/sample_sheet.py --model gspn2-emoji --prompts configs/sheet-prompts.json --out docs/sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Load, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="pipeline folder or the name of an embedded model")
    parser.add_argument("--prompts", required=True, help="JSON list or text file with one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="the sheet, a PNG")
    parser.add_argument("--pictures", type=Path, default=None, help="folder for the single pictures")
    parser.add_argument("--steps", type=int, default=None, help="by default the model's own, 20 for most")
    parser.add_argument("--guidance", type=float, default=None, help="by default the model's own, 4 for most")
    parser.add_argument("--shift", type=float, default=None, help="timestep shift instead of the model's")
    parser.add_argument("--size", type=int, default=None, help="height and width instead of the model's")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn at once")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many prompts")
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--tile", type=int, default=192, help="side of a picture on the sheet in pixels")
    parser.add_argument("--device", default=None, help="cuda or cpu; by default CUDA where there is one")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"))
    draw(parser.parse_args(argv))


def draw(given: argparse.Namespace) -> None:
    """Draw the sheet that the options ask for."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline
    from gspn2_diffusion.training.sheets import contact_sheet, draw_prompts, read_prompts, save_picture

    prompts = read_prompts(given.prompts)[: given.limit]
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = given.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipeline = GSPN2Pipeline.from_pretrained(given.model, dtype=getattr(torch, dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if given.shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, shift=given.shift
        )
    pictures = draw_prompts(
        pipeline,
        prompts,
        steps=given.steps,
        guidance=given.guidance,
        resolution=given.size,
        batch=given.batch,
    )
    captions = [item.prompt for item in prompts]
    save_picture(contact_sheet(pictures, captions, columns=given.columns, tile=given.tile), given.out)
    if given.pictures is not None:
        for number, picture in enumerate(pictures):
            save_picture(picture, given.pictures / f"{number:02d}.png")
    print(f"wrote {given.out}: {len(pictures)} pictures")


if __name__ == "__main__":
    main()
