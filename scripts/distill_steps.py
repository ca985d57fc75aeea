"""Teach a denoiser to draw in a few steps, guidance included, what it draws in many.

    accelerate launch scripts/distill_steps.py --config configs/few-steps.yaml --pretrained gspn2-emoji \
        --output_dir runs/few-steps --max_train_minutes 4

Ends with ``runs/few-steps/pipeline``, a folder whose own defaults are the few steps and no guidance:
``GSPN2Pipeline.from_pretrained(folder)("a red apple")`` draws in 4 steps. ``--resume_from latest`` continues
an interrupted run.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports count towards the budget of minutes


def main(argv: list[str] | None = None) -> None:
    """Parse, train, write."""
    from gspn2_diffusion.training.config import ConfigError, parse_config
    from gspn2_diffusion.training.few_step_config import FewStepConfig

    try:
        config = parse_config(FewStepConfig, argv)
        for name in ("vae", "text_encoder", "tokenizer"):
            config.component(name)
        config.teacher_folder()

        from gspn2_diffusion.training.few_steps import train_few_steps
        from gspn2_diffusion.training.runtime import end_run, start_run

        run = start_run(config, STARTED if argv is None else time.monotonic())
        train_few_steps(run, config)
    except ConfigError as error:  # wrong settings or no usable data: one line, no traceback
        raise SystemExit(f"distill_steps: {error}") from None
    end_run(run)


if __name__ == "__main__":
    main()
