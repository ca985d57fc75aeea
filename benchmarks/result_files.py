"""Result files that grow over several runs: a run replaces the rows that it measured and keeps the others."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspn2_diffusion.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def device_name(device: str) -> str:
    """The device as it stands in file names: ``nvidia-h200``, or ``cpu``."""
    if not device.startswith("cuda"):
        return "cpu"
    import torch

    return torch.cuda.get_device_name().replace(" ", "-").lower()


def start(commit: str | None, **settings: Any) -> Row:
    """The head of a result: environment, date, commit (of the tree, where none is given), run, settings."""
    named = {"commit": commit} if commit else {}
    # Not the date: two runs can be made within a second.
    return {**describe_environment(), **named, "run": uuid.uuid4().hex[:12], **settings}


def stamp(rows: Sequence[Row], head: Row) -> list[Row]:
    """Rows that say which run made them; rows of one run share both."""
    return [{**row, "run": head["run"], "date": head["date"], "commit": head["commit"]} for row in rows]


def merge(path: Path, head: Row, rows: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """This run's rows, stamped, and those of an earlier file that it did not measure again.

    Args:
        path: the earlier file, which need not exist.
        head: of this run; the earlier one must be of the same GPU and of the same size of models.
        rows: of this run.
        key: the fields that say what a row measures.

    Raises:
        SystemExit: the earlier file is of another GPU, or one of the two is a try with tiny models.
    """
    made = stamp(rows, head)
    if not path.is_file():
        return made
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name in ("gpu", "tiny"):
        if earlier.get(name) != head.get(name):
            sys.exit(
                f"{path} has {name} {earlier.get(name)!r}, this run {head.get(name)!r}; give another --out"
            )
    names = {identity(row, key) for row in made}
    return [row for row in earlier["rows"] if identity(row, key) not in names] + made


def identity(row: Row, key: Sequence[str]) -> str:
    """What a row measures, comparable also after JSON made lists of tuples."""
    return json.dumps([row.get(name) for name in key])


def write(path: Path, result: Row) -> None:
    """JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
