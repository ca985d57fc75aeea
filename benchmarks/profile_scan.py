"""What the line scan's kernels wait for: hardware counters by Nsight Compute, results/profile-<gpu>.json.

    python benchmarks/profile_scan.py                              2 minutes; ncu comes with the CUDA toolkit
    python benchmarks/profile_scan.py --shapes 1x256x256x144       other shapes, B x H x W x C

Of one forward and one backward launch of each shape, in all directions, then of the scans over rows and of
those over columns alone: time, bytes that came from and went to DRAM beside those that inputs and outputs
have, shares of the peak, and the reasons for which warps did not issue, in cycles that a warp waits for each
of its instructions.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from line_scan import make_inputs, parse_shape
from timing import write_result

SHAPES = ["1x64x64x144", "1x256x256x144", "1x1024x1024x144", "16x1024x1024x8", "64x1024x1024x1"]
STALLS = (
    *("barrier", "branch_resolve", "branch_resolving", "dispatch_stall", "drain", "lg_throttle"),
    *("long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "no_instruction", "not_selected"),
    *("short_scoreboard", "sleeping", "wait"),
)
COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.per_cycle_active",
    **{name: f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}
SCANS = {"all": (0, 1, 2, 3), "rows": (0, 1), "columns": (2, 3)}  # directions: down, up, right, left
_WAITS = {COUNTERS[name] for name in STALLS}  # some have other names in some versions of ncu
_KERNELS = r"regex:line_scan_(forward|backward)"


def needed_bytes(shape: Sequence[int], backward: bool, scans: str) -> int:
    """Every input read once and every output written once, in bfloat16."""
    batch, height, width, channels = shape
    d = len(SCANS[scans])
    values = 2 * channels + 2 * d * 3 + 6 * d * channels if backward else channels + d * 3 + 3 * d * channels
    return 2 * batch * height * width * values


def launch_all(shapes: Iterable[tuple[int, int, int, int]], apart: bool) -> None:
    """A forward and a backward launch of each shape and SCANS; only these are seen by the profiler."""
    from gspn2_diffusion.ops import scan_kernels

    runtime = torch.cuda.cudart()
    for shape, scans in itertools.product(shapes, SCANS.values()):
        x, *others = make_inputs(shape, 1, apart)[0]
        weight, lam, u = (tensor[:, :, :, scans[0] : scans[-1] + 1] for tensor in others)
        inputs = (x, weight, lam, u)
        options = (scans, 0, True)
        _, state = scan_kernels.line_scan_forward(*inputs, *options, True)
        assert state is not None
        scan_kernels.line_scan_backward(state, *inputs, state, *options)
        torch.cuda.synchronize()
        runtime.cudaProfilerStart()
        scan_kernels.line_scan_forward(*inputs, *options, False)
        scan_kernels.line_scan_backward(state, *inputs, state, *options)
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()
        del inputs, state, x, weight, lam, u, others
        torch.cuda.empty_cache()


def read_counters(text: str) -> list[dict[str, Any]]:
    """Launches in ncu's raw page as CSV: a line of names, one of units, then one for each launch.

    Raises:
        ValueError: there is no such page in the text, or a counter is missing.
    """
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu printed no counters: {text[-500:]}")
    page = "\n".join(line for line in lines[start:] if line.startswith('"'))
    _, *rows = list(csv.DictReader(io.StringIO(page)))
    known = set(rows[0]) if rows else set()
    missing = sorted(counter for name, counter in COUNTERS.items() if counter not in known | _WAITS)
    if rows and missing:
        raise ValueError(f"ncu does not know {', '.join(missing)}")
    return [
        {"kernel": row["Kernel Name"].split("(")[0]}
        | {name: float(row.get(counter, "0").replace(",", "")) for name, counter in COUNTERS.items()}
        for row in rows
    ]


def summary(shape: Sequence[int], scans: str, counters: dict[str, Any]) -> dict[str, Any]:
    """A row of the result."""
    backward = "backward" in counters["kernel"]
    stalls = sorted(STALLS, key=lambda name: -counters[name])[:4]
    return {
        "shape": list(shape),
        "scans": scans,
        "kernel": counters["kernel"],
        "ms": counters["microseconds"] / 1e6,  # ncu's base unit of time is the nanosecond
        "needed_bytes": needed_bytes(shape, backward, scans),
        "dram_read_bytes": counters["read"],
        "dram_written_bytes": counters["written"],
        "percent_of_peak": {name: round(counters[name], 1) for name in ("dram", "l2", "l1", "issue")},
        "warps": round(counters["warps"], 1),
        "waits": {name: round(counters[name], 2) for name in stalls},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[parse_shape(s) for s in SHAPES])
    parser.add_argument("--apart", action="store_true", help="each direction's inputs together in memory")
    parser.add_argument("--launch", action="store_true", help="what ncu runs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    if options.launch:
        launch_all(options.shapes, options.apart)
        return
    if shutil.which("ncu") is None:
        sys.exit("ncu (Nsight Compute, of the CUDA toolkit) is not on the PATH")
    texts = ["x".join(map(str, shape)) for shape in options.shapes]
    command = [
        *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
        *("--profile-from-start", "off", "-k", _KERNELS, "--metrics", ",".join(COUNTERS.values())),
        *(sys.executable, __file__, "--launch", "--shapes", *texts),
        *(["--apart"] if options.apart else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    launches = read_counters(done.stdout)
    made = list(itertools.product(options.shapes, SCANS, ("forward", "backward")))
    if len(launches) != len(made):
        sys.exit(f"{len(launches)} launches were seen instead of {len(made)}")
    rows = [summary(shape, scans, launch) for (shape, scans, _), launch in zip(made, launches, strict=True)]
    for row in rows:
        print(row, flush=True)
    if options.out or not options.apart:  # the results are of one layout
        print(f"wrote {write_result({'rows': rows}, options.out, 'profile', options.commit)}")


if __name__ == "__main__":
    main()
