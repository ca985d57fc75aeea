"""Whether a command draws with the model's few-step adapter; imports no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gspn2_diffusion.cli.adapters import require_peft
from gspn2_diffusion.cli.console import CliError, say

Option = Annotated[
    bool | None,
    typer.Option(
        "--few-steps/--no-few-steps",
        help="Draw with the model's few-step adapter. By default on a CPU, where the model has one and none "
        "of steps, guidance and negative prompt is given. Needs peft.",
        show_default=False,
    ),
]


def check(wanted: bool | None, config: Mapping[str, Any] | None) -> None:
    """Raises ``CliError`` for ``--few-steps`` that cannot be had.

    Args:
        wanted: the option; None where neither form was given.
        config: what the model's index says; None where it is not known yet.
    """
    if wanted:
        require_peft("--few-steps")
        if config is not None and not config.get("few_steps"):
            raise CliError("--few-steps: this model has no few-step adapter")


def choose(wanted: bool | None, named: bool, config: Mapping[str, Any], device: str, quiet: bool) -> bool:
    """Whether to draw in few steps; says so in one line where nobody asked.

    Args:
        wanted: the option.
        named: steps, guidance or a negative prompt were given.
        config: of the loaded pipeline.
        device: torch's name of its kind.
        quiet: say nothing.

    Raises:
        CliError: it is wanted, but the model has no adapter.
    """
    steps = config.get("few_steps")
    if wanted is not None or not steps or named or device != "cpu":
        check(wanted, config)
        return bool(wanted)
    installed = importlib.util.find_spec("peft") is not None
    if not quiet:
        there = f"draws in {steps} steps with its adapter (--no-few-steps: without)"
        missing = f"would draw in {steps} steps if peft were there: pip install 'peft>=0.17'"
        say(f"note: on a CPU this model {there if installed else missing}")
    return installed
