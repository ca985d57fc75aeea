"""Train a LoRA or DoRA adapter on your own pictures, DreamBooth's prior preservation as an option.

    accelerate launch scripts/train_lora.py --pretrained gspn2-emoji --data my/pictures \
        --output_dir runs/lora --max_train_steps 500
    accelerate launch scripts/train_lora.py --data my/dog --caption "a sks dog" \
        --class_data runs/dogs --class_prompt "a dog" --output_dir runs/dreambooth --max_train_steps 400

Ends with ``runs/lora/lora``, a folder for ``pipe.load_lora_weights``. ``--resume_from latest`` continues an
interrupted run. Every setting of ``--help`` can stand in a YAML file (``--config``).
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports count towards the budget of minutes


def main(argv: list[str] | None = None) -> None:
    """Parse, train, write."""
    from gspn2_diffusion.training.config import ConfigError, parse_config
    from gspn2_diffusion.training.lora_config import LoraTrainConfig

    try:
        config = parse_config(LoraTrainConfig, argv)
        for name in ("vae", "text_encoder", "tokenizer"):
            config.component(name)
        config.base()

        from gspn2_diffusion.training.lora import train_lora
        from gspn2_diffusion.training.runtime import end_run, start_run

        run = start_run(config, STARTED if argv is None else time.monotonic())
        train_lora(run, config)
    except ConfigError as error:  # wrong settings or no usable data: one line, no traceback
        raise SystemExit(f"train_lora: {error}") from None
    end_run(run)


if __name__ == "__main__":
    main()
