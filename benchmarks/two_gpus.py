"""One denoising step of a large picture on one GPU and on several; adds to benchmarks/results.

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py                 0.6B model, 8192 px, under 1 minute
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --pixels 4096   another size, another row
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --tiny --device cpu --out /tmp/out.json

Every rank first runs the whole step alone, then its share; the results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from model_families import FAMILIES, build, make_inputs, tiny
from result_files import RESULTS, device_name, merge, start, write

from gspn2_diffusion.models.sharding import shard_rows, unshard_rows

AT_LEAST = 1.6  # times faster on two
TOLERANCE = 2e-2  # relative, of bfloat16


def timed(call: Callable[[], Any], cuda: bool, repeats: int) -> tuple[float, Any]:
    """Median milliseconds between barriers, after one warm-up, and the last result."""
    result = call()
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pixels", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    family = tiny(FAMILIES["own-pixart"]) if options.tiny else FAMILIES["own-pixart"]
    dtype = torch.bfloat16 if cuda else torch.float32
    pixels = family.sizes[-1] if options.tiny else options.pixels

    torch.manual_seed(0)  # the same weights and inputs on every rank
    model = build(family, "gspn2", device, dtype)
    for name, parameter in model.named_parameters():  # gates near zero would hide every error
        torch.nn.init.normal_(parameter, std=0.5 if "scale_shift_table" in name else 0.02)
    inputs = make_inputs(family, pixels, device, dtype)
    with torch.no_grad():
        alone_ms, alone = timed(lambda: model(**inputs)[0], cuda, options.repeats)
        alone = alone.clone()
        alone_peak = torch.cuda.max_memory_allocated() if cuda else None
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        shard_rows(model)
        shared_ms, shared = timed(lambda: model(**inputs)[0], cuda, options.repeats)
        unshard_rows(model)
    error = ((shared.float() - alone.float()).norm() / alone.float().norm()).item()
    if dist.get_rank() == 0:
        row = {
            "ranks": dist.get_world_size(),
            "pixels": pixels,
            "one_ms": alone_ms,
            "all_ms": shared_ms,
            "speedup": alone_ms / shared_ms,
            "speedup_at_least": AT_LEAST,
            "relative_error": error,
            "finite": bool(torch.isfinite(shared).all()),
            "one_peak_bytes": alone_peak,
            "all_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "met": alone_ms / shared_ms >= AT_LEAST and error <= TOLERANCE,
        }
        head = start(options.commit, tiny=options.tiny)
        out = options.out or RESULTS / f"several-gpus-{device_name(options.device)}.json"
        write(out, {**head, "rows": merge(out, head, [row], ("pixels", "ranks"))})
        print(json.dumps(row, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
