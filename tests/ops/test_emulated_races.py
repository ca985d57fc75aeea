"""The emulated GPU watches all accesses to shared memory (emulator/races.hpp): does it see what is unordered?

compute-sanitizer's racecheck knows little of barriers in shared memory that count bytes.
"""

from __future__ import annotations

import pytest
import torch
from emulate import SHARED_LIMIT, emulated, library, needs_compiler
from scan_cases import make_inputs

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.plans import Problem, Tile, tiled_plan

pytestmark = needs_compiler

BF16 = torch.bfloat16
ONE = ((14, 9), 32, Tile(4, 1, 16, 1, 0, 4), 5, BF16)  # (H, W), C, tile, chunk, dtype
CLUSTER = ((24, 16), 32, Tile(4, 1, 16, 2, 8, 1), 9, BF16)


def launch(size, channels, tile, chunk, dtype):
    """Forward and backward, all four directions."""
    inputs = make_inputs(1, *size, channels, 1, 4, dtype=dtype)
    x, weight, lam, u = (t.detach() for t in inputs.values())
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plans = []
    for backward in (False, True):
        problem = Problem(1, *size, channels, 1, (0, 1, 2, 3), chunk, dtype.itemsize, backward)
        plans.append(tiled_plan(problem, tile, True, SHARED_LIMIT))
    setting = ((0, 1, 2, 3), chunk, True)
    _, state = scan_kernels.line_scan_forward(x, weight, lam, u, *setting, True, plan=plans[0])
    scan_kernels.line_scan_backward(dy, x, weight, lam, u, state, *setting, plan=plans[1])


# (in the source, instead, case): steps without which threads get in each other's way.
BROKEN = {
    "no barrier between lines": ("consumer_barrier(consumers);", ";", ONE),
    "a stage is taken before it came": ("wait_barrier(m.barriers + slot.index, slot.phase);", ";", ONE),
    "a stage is stored before it is done": (
        "wait_barrier(m.barriers + ring + slot.index, slot.phase);",
        ";",
        ONE,
    ),
    "results are not published": ("publish_results();", ";", ONE),
    "neighbours' states are used before all have them": (
        "h.publish(previous, at, slice, apart);\n        consumer_barrier(consumers);",
        "h.publish(previous, at, slice, apart);",
        CLUSTER,
    ),
    "a stage ends without the weighers": ("stage_barrier(consumers);", ";", ONE),
}


@pytest.mark.parametrize("case", [ONE, CLUSTER], ids=["one", "cluster"])
def test_nothing_is_found_in_whole_kernels(case, monkeypatch):
    with emulated(monkeypatch):
        launch(*case)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_in_order_is_found(name, monkeypatch):
    before, after, case = BROKEN[name]
    whole = cupy_backend.kernel_source

    def broken(*arguments, **options):
        source = whole(*arguments, **options)
        assert "forward" not in source or before in source
        return source.replace(before, after)

    monkeypatch.setattr(cupy_backend, "kernel_source", broken)
    library.cache_clear()
    try:
        with emulated(monkeypatch), pytest.raises(RuntimeError, match="race"):
            launch(*case)
    finally:
        library.cache_clear()
