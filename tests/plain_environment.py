"""The environment of tests that look at output or start a server, whatever the shell around them says."""

from __future__ import annotations

import os

_NAMES = {
    # how wide and colourful libraries write
    *("COLUMNS", "LINES", "TERMINAL_WIDTH", "TERM", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS", "PYTHONWARNINGS", "PYTHONVERBOSE"),
    # which of several processes this is
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    # proxies, through which nobody reaches this machine's own servers
    *("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"),
    # ours
    *("GSPN2_DEBUG", "GSPN2_APP_AUTH"),
}
_PREFIXES = ("GRADIO_", "TYPER_", "_TYPER_")


def clean() -> None:
    """Takes such variables out of this process for good: libraries read some of them when imported."""
    for name in list(os.environ):
        if name in _NAMES or name.startswith(_PREFIXES):
            del os.environ[name]
