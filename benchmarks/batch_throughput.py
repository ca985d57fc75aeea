"""``gspn2 batch`` against a bare loop over the same batches, and two GPUs against one.

Writes benchmarks/results/batch_throughput-<gpu>.json. Every measurement is a process of its own that starts
cold: both the command and the bare loop load kernels and libraries while they draw their first batch. Counted
is from the loaded model to the last picture: in the bare loop until the GPU has computed its pixels, for the
command until the file and its line in the manifest are on the disk.

    python benchmarks/batch_throughput.py                      # every GPU count up to 2 that is there
    python benchmarks/batch_throughput.py --device cpu --pictures 8 --steps 1 --model FOLDER   # to try it out
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GOAL_BARE, GOAL_TWO = 0.85, 1.9
THINGS = ("a red apple", "a penguin", "a rocket", "a slice of pizza", "a cactus", "a lighthouse", "an owl")
STYLES = ("3d", "flat", "noto", "blob", "twemoji", "emojione")


def write_prompts(path: Path, count: int) -> None:
    """``count`` different prompts with seeds of their own."""
    lines = [
        f"{THINGS[k % len(THINGS)]}, {STYLES[k // len(THINGS) % len(STYLES)]} style --d {k}"
        for k in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")


def run_batch(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The command on ``processes`` GPUs; pictures/s, batch sizes, and the times of each process."""
    with tempfile.TemporaryDirectory(prefix="gspn2-throughput-") as folder:
        prompts, out = Path(folder, "prompts.txt"), Path(folder, "out")
        write_prompts(prompts, options.pictures * processes)
        command = [
            sys.executable,
            "-m",
            "gspn2_diffusion",
            "batch",
            str(prompts),
            "--out",
            str(out),
            "--json",
        ]
        command += ["--model", options.model, "--steps", str(options.steps), "--device", options.device]
        command += ["--batch-size", options.batch_size]
        started = time.perf_counter()
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            for environment in _environments(processes)
        ]
        # Read side by side: a process whose pipe is full would wait.
        outputs = _read_all(running)
        wall = time.perf_counter() - started
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"gspn2 batch ended with {codes}")
        files = sum(1 for _ in out.glob("*.png"))
    events = [[json.loads(line) for line in text.splitlines()] for text in outputs]
    ends = [events_of_one[-1] for events_of_one in events]
    if files != options.pictures * processes or any(end["event"] != "end" for end in ends):
        sys.exit(f"{files} pictures instead of {options.pictures * processes}")
    seconds = max(end["ended"] for end in ends) - min(end["started"] for end in ends)
    return {
        "pictures": files,
        "seconds": round(seconds, 3),
        "pictures_per_second": round(files / seconds, 2),
        "seconds_with_start": round(wall, 3),
        "batches": [[e["count"] for e in one if e["event"] == "batch"] for one in events],
        # As if all processes had started at the same moment.
        "pictures_per_second_summed": round(
            sum(options.pictures / (end["ended"] - end["started"]) for end in ends), 2
        ),
        "seconds_of_each": [round(end["ended"] - end["started"], 3) for end in ends],
    }


def _environments(processes: int) -> list[dict[str, str]]:
    """As ``accelerate launch`` sets them."""
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if processes == 1:
        return [{k: v for k, v in own.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    shared["LOCAL_WORLD_SIZE"] = str(processes)
    return [{**own, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _read_all(running: list[subprocess.Popen[str]]) -> list[str]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(running)) as readers:
        return list(readers.map(lambda process: process.stdout.read() if process.stdout else "", running))


def bare_loop(options: argparse.Namespace, sizes: list[int]) -> float:
    """Seconds of the pipeline alone for batches of ``sizes``; pixels stay on the device. Runs in a child."""
    import torch

    from gspn2_diffusion.cli import loading
    from gspn2_diffusion.cli.options import resolve_device, resolve_dtype

    device = resolve_device(options.device)
    pipe, _ = loading.load_pipeline(loading.find_model(options.model), device, resolve_dtype("auto", device))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        write_prompts(prompts, sum(sizes))
        texts = [line.partition(" --d")[0] for line in prompts.read_text().splitlines()]
    started, first = time.perf_counter(), 0
    for size in sizes:
        pipe(
            texts[first : first + size],
            num_inference_steps=options.steps,
            guidance_scale=4.0,
            generator=[torch.Generator("cpu").manual_seed(first + k) for k in range(size)],
            output_type="pt",
        )
        first += size
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_bare(options: argparse.Namespace, sizes: list[int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--bare", ",".join(map(str, sizes)), "--model", options.model]
    command += ["--steps", str(options.steps), "--device", options.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=_environments(1)[0])
    seconds = float(done.stdout.splitlines()[-1])
    return {"seconds": round(seconds, 3), "pictures_per_second": round(sum(sizes) / seconds, 2)}


def measure(options: argparse.Namespace, gpus: int, found: dict[str, Any], write: Callable[[], None]) -> None:
    """All runs, one after the other, into ``found``, written after each part; ratios are of medians."""
    found |= {"batch": [], "bare": []}
    run_bare(options, [1])  # compiles the kernels into their cache on the disk
    for _ in range(options.repeats):
        found["batch"].append(run_batch(options, 1))
        write()
        found["bare"].append(run_bare(options, found["batch"][-1]["batches"][0]))
    speed = {
        name: statistics.median(run["pictures_per_second"] for run in found[name])
        for name in ("batch", "bare")
    }
    found["share_of_bare_loop"] = round(speed["batch"] / speed["bare"], 4)
    found["goal_share_of_bare_loop"] = GOAL_BARE
    write()
    if gpus > 1:
        found["two"] = [run_batch(options, 2) for _ in range(options.repeats)]
        two = statistics.median(run["pictures_per_second"] for run in found["two"])
        found["two_over_one"], found["goal_two_over_one"] = round(two / speed["batch"], 4), GOAL_TWO
        write()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gspn2-emoji")
    parser.add_argument("--pictures", type=int, default=6144, help="of each GPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--processes", type=int, help="1 or 2; as many as there are GPUs by default")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/batch_throughput-<gpu>.json")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(bare_loop(options, [int(size) for size in options.bare.split(",")]))
        return
    import torch

    from gspn2_diffusion.environment import describe_environment

    gpus = options.processes or max(1, min(2, torch.cuda.device_count()))
    found: dict[str, Any] = {**describe_environment(), "cores": os.cpu_count()}
    if options.commit:
        found["commit"] = options.commit
    settings = ("model", "pictures", "steps", "batch_size", "device", "repeats")
    found["settings"] = {name: getattr(options, name) for name in settings}
    found["settings"]["model"] = Path(options.model).name
    name = str(found["gpu"]).replace(" ", "-") if found["gpu"] != "none" else "cpu"
    path = options.out or RESULTS / f"batch_throughput-{name}{'-x2' if gpus > 1 else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(path)

    measure(options, gpus, found, write)
    print(json.dumps({k: v for k, v in found.items() if k not in ("batch", "bare", "two")}, indent=1))
    print("written", path)


if __name__ == "__main__":
    main()
