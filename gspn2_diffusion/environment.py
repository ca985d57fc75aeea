"""What a measurement was made on, to be written beside it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "cupy-cuda13x", "cupy-cuda12x")


def describe_environment() -> dict[str, str | int]:
    """GPU and their number, versions, UTC date and commit, as JSON can hold them."""
    import torch

    found: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpus": torch.cuda.device_count(),
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_commit() -> str:
    """Commit of the checkout this package runs from; ``unknown`` outside one, ``+`` marks local changes."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, cwd=folder, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "environment.py"):
            return "unknown"  # installed inside somebody else's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno", "--", "..") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
