"""Measure a pipeline on the fixed prompts with judges that are measured themselves.

    python scripts/evaluate.py --model gspn2-emoji --data data/emoji --out runs/evaluation

Writes ``results.json`` and ``sheet.png`` into --out (with ``--sizes 128,192x320`` one of each per size, with
the size in its name unless it is the model's own) and prints the scores with 95% intervals beside what the
same judges give real pictures. The judge is trained on the first call (under a minute on a GPU) and kept in
--judge, so that several models meet the same one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> None:
    """Parse, draw, judge, write."""
    given = _parser().parse_args(argv)
    try:
        evaluate(given)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"evaluate: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="pipeline folder or the name of an embedded model")
    add("--data", type=Path, default=Path("data/emoji"), help="prepared emoji folder or archive")
    add("--out", type=Path, required=True, help="folder for results.json and sheet.png")
    add("--judge", type=Path, default=None, help="folder of the judge; by default OUT/judge")
    add("--limit", type=int, default=None, help="at most so many prompts of each group")
    add("--groups", default=None, help="groups of prompts, by commas; by default all")
    add("--sizes", default=None, help="sizes by commas, such as 128,256,192x320 (height x width)")
    add("--steps", type=int, default=None, help="by default the model's own, 20 for most")
    add("--guidance", type=float, default=None, help="by default the model's own, 4 for most")
    add("--few_steps", action="store_true", help="with the model's few-step adapter")
    add("--batch", type=int, default=64, help="pictures drawn at once")
    add("--sprite_cache", default=None, help="folder for drawn sprites")
    add("--judge_steps", type=int, default=2000)
    add("--judge_seconds", type=float, default=50.0, help="limit of the judge's training")
    add("--judge_batch", type=int, default=384)
    add("--judge_width", type=int, default=48)
    add("--device", default=None, help="cuda or cpu; by default CUDA where there is one")
    add("--dtype", default=None, choices=("float32", "bfloat16"))
    add("--fid", action="store_true", help="also FID by torchmetrics (needs Inception weights)")
    add("--fid_weights", default=None, help="file of the Inception weights")
    add("--clip", default=None, help="also CLIP score with this model (folder or Hub name)")
    return parser


def evaluate(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluate as the options say; returns what was written, one entry per size."""
    import torch

    from gspn2_diffusion.evaluation.pictures import load_pipeline
    from gspn2_diffusion.evaluation.prompts import SIZES, evaluation_prompts
    from gspn2_diffusion.training.emoji import load_records

    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    records = load_records(given.data)
    groups = given.groups.split(",") if given.groups else list(SIZES)
    prompts = evaluation_prompts(records, {group: SIZES.get(group, -1) for group in groups}, given.limit)
    if not prompts:
        raise ValueError(f"{given.data} holds no records for the groups {', '.join(groups)}")
    judge, accuracy = find_judge(given, records, device)
    pipeline = load_pipeline(given.model, device, getattr(torch, dtype))
    if given.few_steps:
        pipeline.enable_few_steps()
    sizes = [parse_size(text) for text in given.sizes.split(",")] if given.sizes else [None]
    return [_evaluate_size(given, pipeline, prompts, records, judge, accuracy, size) for size in sizes]


def parse_size(text: str) -> tuple[int, int]:
    """ "256" -> (256, 256), "192x320" -> (192, 320), height first.

    Raises:
        ValueError: it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--sizes has {text!r}; write sizes such as 256 or 192x320")
    return int(parts[0]), int(parts[-1])


def find_judge(
    given: argparse.Namespace, records: Sequence[Any], device: Any
) -> tuple[Any, dict[str, float]]:
    """The saved judge, or a new one, which is saved."""
    from gspn2_diffusion.evaluation.judge import JudgeSize, load_judge
    from gspn2_diffusion.evaluation.judge_training import JudgeTraining, judge_data, train_judge

    folder = given.judge or given.out / "judge"
    if (folder / "judge.json").is_file():
        return load_judge(folder, device)
    judge, measures = train_judge(
        judge_data(records),
        device,
        size=JudgeSize(width=given.judge_width),
        training=JudgeTraining(given.judge_steps, given.judge_seconds, given.judge_batch),
        cache_dir=given.sprite_cache,
    )
    judge.save(folder, measures)
    return judge, measures


def _evaluate_size(
    given: argparse.Namespace,
    pipeline: Any,
    prompts: Sequence[Any],
    records: Sequence[Any],
    judge: Any,
    accuracy: dict[str, float],
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Draw, judge and write one size."""
    import time

    from gspn2_diffusion.evaluation import report
    from gspn2_diffusion.evaluation.pictures import RealPictures, as_tensor, generate, own_settings
    from gspn2_diffusion.evaluation.scoring import score

    started = time.monotonic()
    pictures = generate(
        pipeline, prompts, steps=given.steps, guidance=given.guidance, size=size, batch=given.batch
    )
    seconds = time.monotonic() - started
    shape = (pictures[0].height, pictures[0].width)
    real_pictures = RealPictures(records, prompts, shape, given.sprite_cache)
    drawn = [as_tensor(picture) for picture in pictures]
    found = score(judge, prompts, drawn.__getitem__)
    real = score(judge, prompts, real_pictures)
    settings = {
        "model": Path(given.model).name,
        "height": shape[0],
        "width": shape[1],
        **own_settings(pipeline, given.steps, given.guidance),
        "seconds_per_picture": round(seconds / len(pictures), 4),
    }
    facts = report.results(prompts, found, real, accuracy, distances(found, real), settings)
    facts |= _optional(given, judge, drawn, [real_pictures(i) for i in range(len(prompts))], prompts)
    own = getattr(pipeline, "default_size", None)
    name = "" if size is None or shape == (own, own) else f"-{shape[0]}x{shape[1]}"
    report.write_json(facts, given.out / f"results{name}.json")
    report.sheet(prompts, pictures, found.passed, given.out / f"sheet{name}.png")
    print(f"== {given.model} at {shape[0]}x{shape[1]}\n{report.table(facts)}", flush=True)
    return facts


def distances(found: Any, real: Any) -> dict[str, float]:
    """Frechet distance in the judge's feature space, and that of two halves of the real pictures."""
    from gspn2_diffusion.evaluation.statistics import frechet_distance, frechet_interval

    if len(real.features) < 4:
        return {}
    value, low, high = frechet_interval(found.features, real.features)
    halves = frechet_distance(real.features[::2], real.features[1::2])
    return {"value": value, "low": low, "high": high, "real": halves, "pictures": len(real.features)}


def _optional(
    given: argparse.Namespace, judge: Any, drawn: list[Any], real: list[Any], prompts: Sequence[Any]
) -> dict[str, Any]:
    """FID and CLIP score where asked for; what is missing is said, not fatal."""
    from gspn2_diffusion.evaluation.optional_metrics import MissingMetricError, clip_score, fid

    device = next(judge.parameters()).device
    found: dict[str, Any] = {}
    for name, wanted, compute in (
        ("fid", given.fid, lambda: fid(real, drawn, given.fid_weights, device)),
        (
            "clip_score",
            given.clip,
            lambda: clip_score(drawn, [p.prompt for p in prompts], given.clip, device),
        ),
    ):
        if wanted:
            try:
                found[name] = compute()
            except MissingMetricError as error:
                print(f"evaluate: {error}")
                found[name] = None
    return found


if __name__ == "__main__":
    main()
