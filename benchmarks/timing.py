"""Timing and results shared by the benchmarks."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gspn2_diffusion.environment import describe_environment

RESULTS = Path(__file__).parent / "results"


def time_graph(function: Callable[[], object], replays: int) -> float:
    """Median milliseconds of one replay of a CUDA graph of ``function``, by device events."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes read and written per second by a kernel that streams a large tensor into another.

    An elementwise kernel, since a copy captured in a graph may run on a slower copy engine.
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds = time_graph(lambda: torch.neg(source, out=target), 20)
    return 2 * source.numel() * source.element_size() / (milliseconds * 1e-3)


def write_result(result: dict[str, Any], path: Path | None, name: str, commit: str | None) -> Path:
    """Write a result with the machine, versions, date and commit in it; returns where."""
    gpu = torch.cuda.get_device_name().replace(" ", "-").lower()
    path = path or RESULTS / f"{name}-{gpu}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {**describe_environment(), **({"commit": commit} if commit else {}), **result}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(full, indent=1) + "\n")
    temporary.replace(path)
    return path
