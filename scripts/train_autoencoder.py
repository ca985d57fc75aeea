"""Train the picture autoencoder on composed emoji scenes.

    accelerate launch --num_processes 2 scripts/train_autoencoder.py \
        --config configs/autoencoder.yaml --output_dir runs/autoencoder --max_train_minutes 9

Ends with ``runs/autoencoder/vae``, an AutoencoderKL folder, and a sheet of reconstructions. Every setting of
``--help`` can stand in the YAML file.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports count towards the budget of minutes


def main(argv: list[str] | None = None) -> None:
    """Parse, train, write."""
    from gspn2_diffusion.training.config import AutoencoderConfig, ConfigError, parse_config

    try:
        config = parse_config(AutoencoderConfig, argv)
    except ConfigError as error:
        raise SystemExit(f"train_autoencoder: {error}") from None

    from gspn2_diffusion.training.autoencoder import train_autoencoder
    from gspn2_diffusion.training.runtime import end_run, start_run

    run = start_run(config, STARTED if argv is None else time.monotonic())
    train_autoencoder(run, config)
    end_run(run)


if __name__ == "__main__":
    main()
