"""Train the text-to-image denoiser on composed emoji scenes by flow matching.

    accelerate launch --num_processes 2 scripts/train_text_to_image.py \
        --config configs/text-to-image.yaml --output_dir runs/denoiser --max_train_minutes 9

Ends with ``runs/denoiser/pipeline``, a folder for ``GSPN2Pipeline.from_pretrained``. ``--resume_from latest``
continues an interrupted run. Every setting of ``--help`` can stand in the YAML file.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports count towards the budget of minutes


def main(argv: list[str] | None = None) -> None:
    """Parse, train, write."""
    from gspn2_diffusion.training.config import ConfigError, DenoiserConfig, parse_config

    try:
        config = parse_config(DenoiserConfig, argv)
        for name in ("vae", "text_encoder", "tokenizer"):
            config.component(name)
    except ConfigError as error:
        raise SystemExit(f"train_text_to_image: {error}") from None

    from gspn2_diffusion.training.denoiser import train_denoiser
    from gspn2_diffusion.training.runtime import end_run, start_run

    run = start_run(config, STARTED if argv is None else time.monotonic())
    train_denoiser(run, config)
    end_run(run)


if __name__ == "__main__":
    main()
