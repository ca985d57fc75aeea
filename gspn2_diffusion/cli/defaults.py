"""The defaults of sampling on the command line, in one place; ``--help`` shows them without a model."""

from __future__ import annotations

MODEL = "gspn2-emoji"
STEPS = 20
GUIDANCE = 4.0
