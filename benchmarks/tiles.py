"""Times every tile that ``ops/tile_choice.py`` can choose, and fits the constants by which it chooses.

    python benchmarks/tiles.py --seconds 100              # measure; writes results/tiles-<gpu>.json
    python benchmarks/tiles.py --kernels plane            # of the plane kernel: ops/plane_plans.py
    python benchmarks/tiles.py --fit results/tiles-nvidia-h200.json

A tile whose result differs from the generic kernel's is reported and not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from line_scan import (
    CASES,
    DIRECTIONS,
    MINIMUM_BYTES,
    SMALL_CHANNELS,
    Inputs,
    make_inputs,
    parse_shape,
    relative_error,
)
from timing import time_graph, write_result

from gspn2_diffusion.ops import cupy_backend, plane_plans, plans, scan_kernels, tile_choice
from gspn2_diffusion.ops.plane_plans import PlaneTile
from gspn2_diffusion.ops.plans import Plan, Problem, Tile, generic_plan

SHAPES = [shape for shape in CASES if shape[3] % 8 == 0]
PLANES = [shape for shape in CASES if shape[3] == 1]
MAX_ERROR = 8e-3  # relative, in bfloat16


class Tiled:
    """The tiled kernels' choices and what they are estimated by."""

    tile = Tile
    fields = ("vec", "run", "slice", "cluster", "halo", "stage_lines", "merged")
    candidates = staticmethod(tile_choice.tiles)
    plan = staticmethod(plans.tiled_plan)
    choose = staticmethod(tile_choice.choose_tile)
    estimate = staticmethod(tile_choice.estimate)

    @staticmethod
    def terms(problem: Problem, tile: Tile, plan: Plan, limit: int, processors: int) -> tuple[float, ...]:
        return tile_choice.cost_terms(problem, plan, limit, processors)


class Plane:
    """The plane kernel's choices; nothing is fitted for it."""

    tile = PlaneTile
    fields = ("cluster",)
    plan = staticmethod(plane_plans.plane_plan)
    choose = staticmethod(plane_plans.choose_plane_tile)

    @staticmethod
    def estimate(problem: Problem, plan: Plan, limit: int, processors: int) -> float:
        return 0.0

    @staticmethod
    def candidates(problem: Problem, clusters: tuple[int, ...]) -> Any:
        return plane_plans.plane_tiles(problem, [n for n in clusters if n in plane_plans.CLUSTERS])


FAMILIES: dict[str, Any] = {"tiled": Tiled, "plane": Plane}


def problem_of(shape: tuple[int, ...], backward: bool) -> Problem:
    batch, height, width, channels = shape
    touching = channels < SMALL_CHANNELS
    return Problem(batch, height, width, channels, 1, tuple(DIRECTIONS), 0, 2, backward, touching)


def run(
    inputs: Inputs, state: torch.Tensor | None, dy: torch.Tensor | None, plan: Plan
) -> list[torch.Tensor]:
    """One launch of a plan: backward where there are hidden states and a gradient, else forward."""
    if state is None or dy is None:
        return [scan_kernels.line_scan_forward(*inputs, DIRECTIONS, 0, True, False, plan=plan)[0]]
    grads = scan_kernels.line_scan_backward(dy, *inputs, state, DIRECTIONS, 0, True, plan=plan)
    return [grad for grad in grads if grad is not None]


def differs(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return any(not relative_error(g, w) <= MAX_ERROR for g, w in zip(got, want, strict=True))


def measure(
    family: Any, shape: tuple[int, int, int, int], backward: bool, seconds: float, likely: bool = False
) -> list[dict[str, Any]]:
    """Milliseconds of as many tiles as fit into the time: those that are likely to be quick, or any."""
    device = torch.cuda.current_device()
    limit, problem = cupy_backend.shared_limit(device), problem_of(shape, backward)
    found = [
        (t, family.plan(problem, t, True, limit))
        for t in family.candidates(problem, cupy_backend.clusters(device))
    ]
    candidates = [(tile, plan) for tile, plan in found if plan is not None]
    processors = cupy_backend.processors(device)
    random.Random(0).shuffle(candidates)
    if likely:
        candidates.sort(key=lambda candidate: family.estimate(problem, candidate[1], limit, processors))
    chosen = family.choose(problem, cupy_backend.clusters(device), limit, processors)
    candidates.sort(key=lambda candidate: candidate[0] != chosen)  # it first, in any case
    bytes_read = 2 * 9 * problem.batch * problem.height * problem.width * problem.channels
    sets = make_inputs(shape, max(1, min(12, -(-MINIMUM_BYTES // bytes_read))))
    vec = min(8, problem.channels)
    forward = generic_plan(problem_of(shape, False), vec, limit)
    states: list[torch.Tensor | None] = [
        scan_kernels.line_scan_forward(*s, DIRECTIONS, 0, True, True, plan=forward)[1] if backward else None
        for s in sets
    ]
    # Not the states themselves: what a launch reads twice comes from the L2.
    dy = None if states[0] is None else torch.randn_like(states[0])
    want = run(sets[0], states[0], dy, generic_plan(problem, vec, limit))
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for tile, plan in candidates:
        if rows and time.perf_counter() - start > seconds:
            break
        if differs(run(sets[0], states[0], dy, plan), want):
            print(f"WRONG: {shape} {'backward' if backward else 'forward'} {tile}", flush=True)
            continue

        def launch(plan: Plan = plan) -> None:
            for inputs, state in zip(sets, states, strict=True):
                run(inputs, state, dy, plan)

        row = {name: getattr(tile, name) for name in family.fields}
        rows.append({"ms": time_graph(launch, 5) / len(sets), **row})
    return rows


def fit(family: Any, cases: list[dict[str, Any]], backward: bool, limit: int, processors: int) -> np.ndarray:
    """Non-negative constants of ``cost_terms`` by weighted least squares on the relative error.

    Tiles near the best of their shape count most, and every shape counts alike.
    """
    terms, times, weights = [], [], []
    for case in (case for case in cases if case["backward"] == backward):
        problem = problem_of(tuple(case["shape"]), backward)
        best = min(row["ms"] for row in case["tiles"])
        for row in case["tiles"]:
            tile = family.tile(*(row[name] for name in family.fields))
            plan = family.plan(problem, tile, True, limit)
            if plan is not None:
                terms.append(family.terms(problem, tile, plan, limit, processors))
                times.append(row["ms"] * 1e6)
                weights.append((best / row["ms"]) ** 1.5 / len(case["tiles"]) ** 0.5)
    weight = np.array(weights)
    matrix = np.array(terms) / np.array(times)[:, None] * weight[:, None]
    gram, target = matrix.T @ matrix, matrix.T @ weight
    constants = np.zeros(len(gram))
    for _ in range(5000):
        for k in range(len(constants)):
            if gram[k, k] > 0:
                constants[k] = max(0.0, constants[k] + (target[k] - gram[k] @ constants) / gram[k, k])
    return constants


def quicker(
    cases: list[dict[str, Any]],
    backward: bool,
    limit: int,
    processors: int,
    start: np.ndarray,
    steps: int = 4000,
) -> np.ndarray:
    """Constants by which the tiled kernels' estimate leads to quicker tiles: a random walk from ``start`` and
    from those in use.

    Least squares weigh how well a time is estimated; what counts is which of a shape's tiles is the lowest,
    and only a little that the estimates stay nanoseconds.
    """
    shapes = []
    for case in (case for case in cases if case["backward"] == backward):
        problem, rows = problem_of(tuple(case["shape"]), backward), []
        for row in case["tiles"]:
            tile = Tile(*(row[name] for name in Tiled.fields))
            plan = plans.tiled_plan(problem, tile, True, limit)
            if plan is not None:
                terms = tile_choice.cost_terms(problem, plan, limit, processors)
                now = np.dot(terms, tile_choice._COST[backward])
                factor = tile_choice.estimate(problem, plan, limit, processors) / now  # what follows the sum
                rows.append((row["ms"], factor, *terms))
        shapes.append(np.array(rows))

    def lost(constants: np.ndarray) -> float:
        """What the tiles take longer than the quickest ones, on average over shapes."""
        total = 0.0
        for ms, factor, terms in ((shape[:, 0], shape[:, 1], shape[:, 2:]) for shape in shapes):
            estimates = np.maximum(terms @ constants, 1.0) * factor
            errors = np.log(estimates[np.isfinite(factor)] / ms[np.isfinite(factor)] / 1e6)
            total += ms[np.argmin(estimates)] / ms.min() - 1 + 0.02 * np.sqrt((errors**2).mean())
        return float(total / len(shapes))

    generator = np.random.default_rng(0)
    best = min((start, np.array(tile_choice._COST[backward])), key=lost)
    for _ in range(steps):
        trial = best * np.where(
            generator.random(len(best)) < 0.3, np.exp(generator.normal(0, 0.3, len(best))), 1
        )
        if lost(trial) <= lost(best):
            best = trial
    print(f"{'backward' if backward else 'forward'}: {100 * lost(best):.1f}% lost on average")
    return best


def report(family: Any, case: dict[str, Any], limit: int, processors: int) -> None:
    problem = problem_of(tuple(case["shape"]), case["backward"])
    rows = sorted(case["tiles"], key=lambda row: row["ms"])
    tile = family.choose(problem, cupy_backend.CLUSTERS, limit, processors)
    chosen = {name: getattr(tile, name) for name in family.fields}
    took = next((row["ms"] for row in rows if all(row[n] == chosen[n] for n in family.fields)), None)
    times = f"{took / rows[0]['ms']:.2f} of the best" if took else "not among those measured"
    kind = "backward" if case["backward"] else "forward"
    print(f"{case['shape']} {kind}: {len(rows)} tiles, best {rows[0]}, chosen {chosen}: {times}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=100.0, help="for all shapes together")
    parser.add_argument("--kernels", choices=tuple(FAMILIES), default="tiled")
    parser.add_argument("--passes", choices=("forward", "backward"), help="only one of them")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, help="only these, B x H x W x C: 1x64x64x144"
    )
    parser.add_argument("--likely", action="store_true", help="by their estimates, not at random")
    parser.add_argument("--fit", type=Path, nargs="+", help="results of this program, instead of measuring")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", default=None, help="commit to record where there is no git history")
    options = parser.parse_args()
    if options.fit:
        results = [json.loads(file.read_text()) for file in options.fit]
        family, cases = FAMILIES[results[0]["kernels"]], [case for r in results for case in r["cases"]]
        for backward in sorted({case["backward"] for case in cases}):
            limits = results[0]["shared_limit"], results[0]["processors"]
            constants = fit(family, cases, backward, *limits)
            if family is Tiled:
                constants = quicker(cases, backward, *limits, start=constants)
            print("backward" if backward else "forward", np.round(constants, 1).tolist())
        return
    if not torch.cuda.is_available():
        sys.exit("measuring needs a CUDA GPU")
    torch.manual_seed(0)
    device = torch.cuda.current_device()
    limit, processors = cupy_backend.shared_limit(device), cupy_backend.processors(device)
    family, cases = FAMILIES[options.kernels], []
    with torch.no_grad():
        plane = options.kernels == "plane"
        passes = [kind == "backward" for kind in ("forward", "backward") if options.passes in (None, kind)]
        shapes = options.shapes or (PLANES if plane else SHAPES)
        todo = list(itertools.product(shapes, passes))
        for shape, backward in todo:
            rows = measure(family, shape, backward, options.seconds / len(todo), options.likely)
            cases.append({"shape": list(shape), "backward": backward, "tiles": rows})
            report(family, cases[-1], limit, processors)
            torch.cuda.empty_cache()
    result = {
        "dtype": "bfloat16",
        "kernels": options.kernels,
        "shared_limit": limit,
        "processors": processors,
    }
    name = "tiles" if options.kernels == "tiled" else f"tiles-{options.kernels}"
    print(f"wrote {write_result({**result, 'cases': cases}, options.out, name, options.commit)}")


if __name__ == "__main__":
    main()
