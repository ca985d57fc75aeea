"""Pictures of every size from the embedded model: seconds and peak memory; writes benchmarks/results.

    python benchmarks/high_resolution.py                         256 to 16384 px on a GPU, within 60 GB
    python benchmarks/high_resolution.py --quick                 up to 4096 px, within 12 GB; under 2 minutes
    python benchmarks/high_resolution.py --sizes 8192 --memory 60GB    each size can be a run of its own
    python benchmarks/high_resolution.py --device cpu --sizes 1024 --memory 6GB --threads 2

Pictures go to --pictures (a folder); those above 2048 px also as a small copy, which is what a document can
show. Peak memory is that of the allocator on a GPU, of the whole process so far on a CPU; the plan stands
beside it. A run replaces the sizes that it drew again and keeps the others; ``python benchmarks/render.py``
writes the table.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from result_files import RESULTS, device_name, merge, start, write

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK = (256, 1024, 4096)
PROMPT = "a red apple, flat style, on a blue background"
SMALL = 1024
# Size to (seconds, bytes) that the model should stay below, on one H200 and on two CPU cores.
LIMITS: dict[str, dict[int, tuple[float, float]]] = {
    "cuda": {4096: (40, 12e9), 16384: (600, 60e9)},
    "cpu": {1024: (360, 6e9)},
}


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def draw(pipe: Any, size: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One picture of ``size x size`` into a file."""
    path = options.pictures / f"{size}.png"
    marks: list[tuple[int, float]] = []  # latents along a side, time, after every step

    def mark(_pipe: Any, _index: int, _step: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        marks.append((tensors["latents"].shape[-1], time.perf_counter()))
        return {}

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = pipe(
        options.prompt,
        image=options.start_picture,
        height=size,
        width=size,
        strength=options.strength,
        num_inference_steps=options.steps,
        memory_budget=options.memory,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        output_path=path,
        callback_on_step_end=mark,
    )
    seconds = time.perf_counter() - start
    last_side = marks[-1][0]
    finishing = time.perf_counter() - marks[-1][1]
    final = [at for side, at in marks if side == last_side]
    final_steps = [after - before for before, after in itertools.pairwise(final)]
    row: dict[str, Any] = {
        "pixels": size,
        "seconds": seconds,
        "peak_bytes": peak_bytes(device),
        "plan": str(result.plan),
        "planned_bytes": result.plan.peak,
        "sizes": result.sizes,
        "steps_run": len(marks),
        "seconds_per_step_at_full_size": statistics.median(final_steps) if final_steps else None,
        "decode_and_write_seconds": finishing,
        "file_bytes": path.stat().st_size,
    }
    limit = LIMITS[device.type].get(size)
    if limit:
        row |= {"limits": limit, "met": seconds < limit[0] and row["peak_bytes"] < limit[1]}
    return row


def read_picture(path: Path) -> Any:
    """A picture to start from."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        return picture


def small_copy(path: Path, size: int) -> None:
    """A reduced copy for documents, and a part at full size from the middle."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as picture:
        middle = size // 2 - SMALL // 2
        picture.crop((middle, middle // 2, middle + SMALL, middle // 2 + SMALL)).save(
            path.with_name(f"{size}-part.png")
        )
        picture.reduce(size // SMALL).save(path.with_name(f"{size}-small.png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", nargs="+", type=int)
    parser.add_argument("--memory", help="budget, such as 12GB")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--strength", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--model", default="gspn2-emoji")
    parser.add_argument("--pictures", type=Path, default=Path("high-resolution"))
    parser.add_argument("--start", type=Path, help="enlarge this picture instead of drawing one")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here; --device cpu --sizes 256 works without")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.memory = options.memory or (
        "12GB" if options.quick else "60GB" if device.type == "cuda" else None
    )
    options.start_picture = read_picture(options.start) if options.start else None
    options.pictures.mkdir(parents=True, exist_ok=True)

    from gspn2_diffusion import GSPN2SuperResPipeline

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipe = GSPN2SuperResPipeline.from_pretrained(options.model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda":  # kernels are compiled and libraries loaded before the clock runs
        pipe(options.prompt, height=512, width=512, num_inference_steps=2)

    out = options.out or RESULTS / f"high-resolution-{device_name(options.device)}.json"
    head = start(options.commit, tiny=False, dtype=str(dtype).removeprefix("torch."))
    settings = {key: getattr(options, key) for key in ("prompt", "strength", "steps", "seed", "memory")}
    settings |= {"threads": torch.get_num_threads(), "started_from": options.start and options.start.name}
    rows: list[dict[str, Any]] = []
    for size in options.sizes or (QUICK if options.quick else SIZES):
        rows.append({**draw(pipe, size, options, device), **settings})
        print(rows[-1], flush=True)
        if size > 2 * SMALL:
            small_copy(options.pictures / f"{size}.png", size)
        merged = merge(out, head, rows, ("pixels",))
        write(out, {**head, "rows": sorted(merged, key=lambda row: row["pixels"])})
    print(f"wrote {out}")
    if any(row.get("met") is False for row in rows):
        print("over the limits: " + ", ".join(str(row["pixels"]) for row in rows if row.get("met") is False))


if __name__ == "__main__":
    main()
