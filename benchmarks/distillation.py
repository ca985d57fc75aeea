"""Attention into GSPN-2 in minutes: benchmarks/results/distillation-<gpu>.json.

    python benchmarks/distillation.py --data data/emoji              both steps, about 560 s; or one by one:
    python benchmarks/distillation.py --data data/emoji --step teacher         230 s
    python benchmarks/distillation.py --data data/emoji --step student         330 s

The baseline is the embedded model with softmax attention, from scratch. The student starts as that
model with line scans in the place of attention (stage 0) and has ``--student_minutes`` from the start of its
process: imports, alignment of the blocks and training end to end. The share of the gap in validation loss
between stage 0 and the teacher that it closes comes from the run's own ``metrics.jsonl``, on held-out scenes.
Options after ``--`` go to both scripts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_files import RESULTS, device_name, merge, start, write
from training_report import GAP_CLOSED

ROOT = Path(__file__).parents[1]
STEPS = ("teacher", "student")


def launch(script: str, options: dict[str, Any], more: list[str]) -> float:
    """Run one of the training scripts; seconds."""
    words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words, *more], check=True, cwd=ROOT
    )
    return time.monotonic() - started


def common(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both scripts are told."""
    found = {"output_dir": folder, "trackers": "none", "progress_bar": "no", "resume_from": "none"}
    if options.data is not None:
        found["data"] = options.data
    return found


def train_teacher(options: argparse.Namespace, more: list[str]) -> None:
    """The attention baseline."""
    settings = {
        "config": ROOT / "configs" / "text-to-image.yaml",
        **common(options, options.work / "teacher"),
        "pretrained": options.pretrained,
        "transformer_config": "none",  # that of `pretrained`
        "mixer": "softmax",
        "max_train_minutes": options.teacher_minutes,
        "final_checkpoint": False,
    }
    seconds = launch("train_text_to_image", settings, more)
    (options.work / "teacher.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")


def train_student(options: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """The student; its row."""
    teacher = options.teacher or options.work / "teacher" / "pipeline"
    folder = options.work / "student"
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    settings = {
        "config": ROOT / "configs" / "distill.yaml",
        **common(options, folder),
        "pretrained": teacher,
        "stage1_minutes": options.stage1_minutes,
        "max_train_minutes": options.student_minutes,
        "final_checkpoint": False,
    }
    seconds = launch("distill", settings, more)
    known = options.work / "teacher.json"
    spent = json.loads(known.read_text(encoding="utf-8"))["seconds"] if known.is_file() else None
    ends = json.loads((folder / "gap.json").read_text(encoding="utf-8"))
    return {**closed(folder / "metrics.jsonl", ends), "seconds": seconds, "teacher_seconds": spent}


def closed(metrics: Path, ends: dict[str, Any]) -> dict[str, Any]:
    """The course of the second stage, and whether enough is closed at its end on every set that has a gap."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    course = [line for line in lines if any(name.startswith("val_") for name in line)]
    kept = ("gap_closed_", "val_", "step")
    last = {name: value for name, value in course[-1].items() if name.startswith("gap_closed_")}
    return {
        "ends": ends,
        "gap_closed": {name.removeprefix("gap_closed_"): value for name, value in last.items()},
        "course": [{name: value for name, value in line.items() if name.startswith(kept)} for line in course],
        "wanted": GAP_CLOSED,
        "met": min(last.values(), default=0.0) >= GAP_CLOSED,
    }


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", choices=STEPS, help="one of the two; unset: both")
    parser.add_argument("--data", help="emoji folder or archive; unset: that of the ready settings")
    parser.add_argument("--pretrained", default="gspn2-emoji", help="autoencoder and text encoder")
    parser.add_argument("--teacher", type=Path, help="pipeline of an attention model, if not from here")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "distillation")
    parser.add_argument("--teacher_minutes", type=float, default=3.5)
    parser.add_argument("--stage1_minutes", type=float, default=1.0)
    parser.add_argument("--student_minutes", type=float, default=4.8)
    parser.add_argument("--device", default="cuda", help="cpu for a try of the program")
    parser.add_argument("--out", type=Path, help="JSON file to add to")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    return parser.parse_args(own), more


def main(argv: list[str] | None = None) -> None:
    options, more = parse(sys.argv[1:] if argv is None else argv)
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.step != "student" and options.teacher is None:
        train_teacher(options, more)
    if options.step == "teacher":
        return
    row = train_student(options, more)
    row |= {"minutes_allowed": options.student_minutes}
    head = start(options.commit, tiny=options.device == "cpu")
    out = options.out or RESULTS / f"distillation-{device_name(options.device)}.json"
    write(out, {**head, "rows": merge(out, head, [row], ("minutes_allowed",))})
    print(json.dumps({name: row[name] for name in ("gap_closed", "met", "seconds")}, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
