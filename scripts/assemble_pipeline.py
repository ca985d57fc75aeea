"""Put trained parts together into one pipeline folder in bf16 and check its size.

    python scripts/assemble_pipeline.py --vae runs/autoencoder/vae --transformer runs/denoiser/transformer \
        --text_encoder TEXT --tokenizer TOKENIZER --out gspn2_diffusion/checkpoints/gspn2-emoji --shift 1.0
    ... --few_steps runs/few-steps-lora/lora --few_steps_count 4
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Assemble, check, write; a folder that is already there keeps its model card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("vae", "transformer", "text_encoder", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=1.0, help="timestep shift of the scheduler")
    parser.add_argument(
        "--max_text_tokens", type=int, default=32, help="text length the model was trained with"
    )
    parser.add_argument("--limit_mb", type=float, default=64.0, help="largest size of the folder")
    parser.add_argument("--default_steps", type=int, default=None, help="of a few-step model")
    parser.add_argument("--default_guidance_scale", type=float, default=None, help="1 for a few-step model")
    parser.add_argument("--few_steps", type=Path, default=None, help="folder of a few-step adapter (lora/)")
    parser.add_argument("--few_steps_count", type=int, default=4, help="steps that the adapter draws in")
    parser.add_argument("--balance_scans", action="store_true", help="of a model trained at one size")
    given = parser.parse_args(argv)
    from gspn2_diffusion.training.assembly import assemble, write_pipeline

    try:
        pipeline = assemble(
            vae=given.vae,
            transformer=given.transformer,
            text_encoder=given.text_encoder,
            tokenizer=given.tokenizer,
            shift=given.shift,
            max_text_tokens=given.max_text_tokens,
            default_steps=given.default_steps,
            default_guidance_scale=given.default_guidance_scale,
            few_steps=given.few_steps,
            few_steps_count=given.few_steps_count,
            balance_scans=given.balance_scans,
        )
        size = write_pipeline(pipeline, given.out, given.limit_mb)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"assemble_pipeline: {error}") from None
    print(f"wrote {given.out}: {size:.1f} MB")


if __name__ == "__main__":
    main()
