"""Move a softmax-attention denoiser over to GSPN-2: align every mixer, then distil end to end.

    accelerate launch scripts/distill.py --config configs/distill.yaml --pretrained runs/attention/pipeline \
        --output_dir runs/distilled --stage1_minutes 1 --max_train_minutes 5

The teacher is our own model with ``mixer="softmax"``, or any model that ``convert_to_gspn2`` takes. Ends with
``runs/distilled/transformer`` and ``pipeline``; metrics.jsonl says how much of the gap to the teacher is
closed. ``--resume_from latest`` continues an interrupted run, whichever stage it was in.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()  # imports count towards the budget of minutes


def main(argv: list[str] | None = None) -> None:
    """Parse, train, write."""
    from gspn2_diffusion.training.config import ConfigError, parse_config
    from gspn2_diffusion.training.distill_config import DistillConfig

    try:
        config = parse_config(DistillConfig, argv)
        for name in ("vae", "text_encoder", "tokenizer"):
            config.component(name)
        config.teacher_folder()

        from gspn2_diffusion.training.distill import train_distilled
        from gspn2_diffusion.training.runtime import end_run, start_run

        run = start_run(config, STARTED if argv is None else time.monotonic())
        train_distilled(run, config)
    except ConfigError as error:  # wrong settings or no usable data: one line, no traceback
        raise SystemExit(f"distill: {error}") from None
    end_run(run)


if __name__ == "__main__":
    main()
