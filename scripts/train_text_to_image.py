"""Train the text-to-image denoiser, from scratch or continued, on emoji scenes or on your own pictures.

    accelerate launch --num_processes 2 scripts/train_text_to_image.py \
        --config configs/text-to-image.yaml --output_dir runs/denoiser --max_train_minutes 9
    accelerate launch scripts/train_text_to_image.py --config configs/pictures.yaml --data my/pictures

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

        from gspn2_diffusion.training.denoiser import train_denoiser
        from gspn2_diffusion.training.runtime import end_run, start_run

        run = start_run(config, STARTED if argv is None else time.monotonic())
        train_denoiser(run, config)
    except ConfigError as error:  # wrong settings or no usable data: one line, no traceback
        raise SystemExit(f"train_text_to_image: {error}") from None
    end_run(run)


if __name__ == "__main__":
    main()
