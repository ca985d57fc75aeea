"""Train several mixers (or ablations) from the same seed and data order, judge them, and write the tables.

    python scripts/compare_mixers.py train --study mixers --pretrained gspn2-emoji --steps 2000 --batch 512
    python scripts/compare_mixers.py report
    python scripts/compare_mixers.py sheet --variants gspn2,softmax

"train" runs one variant per GPU at a time, each for exactly --steps steps, then lets one judge see all their
pictures, and writes benchmarks/results/<study>.json. Variants that the file holds already stay in it, if they
were trained with the same settings, so a study may be made in several calls; runs and judgements that --work
holds from a call that was cut off are not repeated. With --at_once variants share a GPU, since setting up a
short run takes longer than training it; steps are then timed at the end, with the GPU to themselves. "report"
makes docs/results.md from the files in benchmarks/results; "sheet" makes docs/results-transfer.webp from the
sheets that judging at several --sizes left in --work. Options after "--" go to scripts/train_text_to_image.py
unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD = "command.json"  # in the folder of what a command made, once it ended well


def main(argv: list[str] | None = None) -> None:
    """Parse and run."""
    arguments = sys.argv[1:] if argv is None else argv
    own, passed = arguments, []
    if "--" in arguments:
        own, passed = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    given = _parser().parse_args(own)
    if given.action == "report":
        from gspn2_diffusion.evaluation.document import write_document

        print(f"wrote {write_document(given.results, given.document)}")
        return
    try:
        if given.action == "sheet":
            from gspn2_diffusion.evaluation.document import TRANSFER_SHEET
            from gspn2_diffusion.evaluation.transfer_sheet import transfer_sheet

            names = (given.variants or "gspn2,softmax").split(",")
            folders = [given.work / given.study / name / "evaluation" for name in names]
            print(f"wrote {transfer_sheet(folders, given.document.with_name(TRANSFER_SHEET))}")
            return
        train(given, passed)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"compare_mixers: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "report", "sheet"))
    add = parser.add_argument
    add("--study", default="mixers", choices=("mixers", "ablations"))
    add("--variants", default=None, help="only these, by commas")
    add("--base", type=Path, default=ROOT / "configs" / "gspn2-emoji-transformer.json")
    add("--config", type=Path, default=ROOT / "configs" / "text-to-image.yaml", help="training settings")
    add("--pretrained", default="gspn2-emoji", help="folder with vae/, text_encoder/, tokenizer/")
    add("--vae", default=None, help="another autoencoder; its latent channels must be the base's")
    add("--data", default="data/emoji")
    add("--sprite_cache", default="data/sprites")
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=512)
    add("--seed", type=int, default=0)
    add("--work", type=Path, default=Path("runs/comparison"), help="folder of the runs")
    add("--results", type=Path, default=RESULTS)
    add("--document", type=Path, default=ROOT / "docs" / "results.md")
    add("--judge", type=Path, default=None, help="folder of a saved judge")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True)
    add("--limit", type=int, default=None, help="at most so many prompts of each group")
    add("--sample_steps", type=int, default=20)
    add("--sizes", default=None, help="also judged at these sizes, see evaluate.py")
    add("--at_once", type=int, default=1, help="variants that are trained together on each GPU")
    add("--commit", default=None, help="commit to record where there is no git history")
    add("--judge_options", default="", help="options of evaluate.py for the judge, in one text")
    return parser


def train(given: argparse.Namespace, passed: Sequence[str]) -> Path:
    """Train and judge every variant; returns the results file."""
    from gspn2_diffusion.environment import describe_environment
    from gspn2_diffusion.evaluation.comparison import count_parameters, read_run, variants
    from gspn2_diffusion.evaluation.report import write_json

    if given.at_once < 1:
        raise ValueError(f"--at_once is {given.at_once}; allowed: 1 or more")
    base = {k: v for k, v in json.loads(given.base.read_text()).items() if not k.startswith("_")}
    configs = variants(given.study, base, more=bool(given.variants))
    if given.variants:
        unknown = set(given.variants.split(",")) - configs.keys()
        if unknown:
            raise ValueError(f"--variants has {sorted(unknown)}; allowed: {', '.join(configs)}")
        configs = {name: configs[name] for name in given.variants.split(",")}
    parameters = {name: count_parameters(config) for name, config in configs.items()}
    print("\n".join(f"{name}: {count:,} parameters" for name, count in parameters.items()), flush=True)
    work = given.work / given.study
    commands = {name: _training(given, work / name, config, passed) for name, config in configs.items()}
    folders = {name: work / name for name in configs}
    status = run_all(commands, folders, at_once=given.at_once)
    finished = [name for name in configs if status[name] == 0]
    scores = judge_all(given, work, finished) if given.evaluate and finished else {}
    alone = time_alone({name: configs[name] for name in finished}) if given.at_once > 1 else {}
    settings = {"steps": given.steps, "batch": given.batch, "seed": given.seed, "other": list(passed)}
    if given.at_once > 1:  # steps are timed in another way, so those of one file are all timed so
        settings["at_once"] = given.at_once
    target = given.results / f"{given.study}.json"
    facts: dict[str, Any] = {
        "study": given.study,
        "settings": settings,
        "environment": describe_environment() | ({"commit": given.commit} if given.commit else {}),
        "variants": earlier_variants(target, settings)
        | {
            name: {
                "config": configs[name],
                "parameters": parameters[name],
                **read_run(work / name),
                **alone.get(name, {}),
                "evaluation": scores.get(name),
            }
            for name in finished
        },
        "failed": [name for name in configs if status[name] != 0],
    }
    write_json(facts, target)
    print(f"wrote {target}; failed: {facts['failed'] or 'none'}")
    return target


def earlier_variants(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Variants of an earlier call with the same settings; those of other settings are dropped."""
    if not file.is_file():
        return {}
    known = json.loads(file.read_text(encoding="utf-8"))
    if known["settings"] != settings:
        print(f"{file} was made with other settings, {known['settings']}: it is replaced")
        return {}
    return dict(known["variants"])


def _training(
    given: argparse.Namespace, folder: Path, config: dict[str, Any], passed: Sequence[str]
) -> list[str]:
    """The command that trains one variant; the same for all but the architecture."""
    folder.mkdir(parents=True, exist_ok=True)
    architecture = folder / "transformer.json"
    architecture.write_text(json.dumps({"_class_name": "GSPN2Transformer2DModel", **config}, indent=1))
    settings: dict[str, Any] = {
        "config": given.config,
        "transformer_config": architecture,
        "output_dir": folder,
        "pretrained": given.pretrained,
        "data": given.data,
        "sprite_cache": given.sprite_cache,
        "max_train_steps": given.steps,
        "batch_size": given.batch,
        "seed": given.seed,
        "validate_minutes": "none",
        "validate_steps": max(1, given.steps // 8),
        "sample_minutes": "none",
        "checkpoint_minutes": "none",
        "final_checkpoint": "false",
        "keep_best": "none",
    }
    if given.vae:
        settings["vae"] = given.vae
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [sys.executable, str(ROOT / "scripts" / "train_text_to_image.py"), *options, *passed]


def time_alone(configs: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Step times of models that were trained beside others, by name; without a GPU there are none."""
    import torch

    from gspn2_diffusion.evaluation.step_time import BATCH, time_steps

    measured = time_steps(configs) if torch.cuda.is_available() else {}
    shared = {"step_milliseconds": None, "pictures_per_second": None, "step_pictures_alone": BATCH}
    return {name: {**shared, "step_milliseconds_alone": measured.get(name)} for name in configs}


def record_of(command: list[str]) -> str:
    """The command, and what the settings say that it reads from files."""
    files = [Path(text) for text in command if text.endswith((".json", ".yaml"))]
    read = {str(file): file.read_text(encoding="utf-8") for file in files if file.is_file()}
    return json.dumps({"command": command, "files": read})


def is_made(folder: Path, command: list[str]) -> bool:
    """Whether this very command, with these settings, filled the folder and ended well."""
    record = folder / RECORD
    return record.is_file() and record.read_text(encoding="utf-8") == record_of(command)


def run_all(
    commands: dict[str, list[str]],
    folders: dict[str, Path],
    needed: Path | None = None,
    at_once: int = 1,
) -> dict[str, int]:
    """Run commands, `at_once` per GPU (one after the other without GPUs); exit status by name.

    Args:
        commands: by name; not run are those that made their folder before.
        folders: what each of them fills.
        needed: a file that the first command makes; the others start once it is there, or that one has ended.
    """
    import torch

    free: Queue[int | None] = Queue()
    for device in (list(range(torch.cuda.device_count())) or [None]) * at_once:  # type: ignore[list-item]
        free.put(device)
    made = {name for name, command in commands.items() if is_made(folders[name], command)}
    left = [name for name in commands if name not in made]
    print("".join(f"{name}: made before\n" for name in made), end="", flush=True)
    first, first_ended = next(iter(left), None), threading.Event()

    def run(name: str) -> int:
        device = free.get()
        try:
            while name != first and needed and not needed.is_file() and not first_ended.wait(0.5):
                pass
            return _run_one(name, commands[name], folders[name], device)
        finally:
            if name == first:
                first_ended.set()
            free.put(device)

    with ThreadPoolExecutor(max(1, free.qsize())) as pool:
        return dict.fromkeys(commands, 0) | dict(zip(left, pool.map(run, left), strict=True))


def _run_one(name: str, command: list[str], folder: Path, device: int | None) -> int:
    environment, log = dict(os.environ), folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    old = [folder / "metrics.jsonl", *folder.rglob(RECORD)]  # of an earlier try, and of what was judged of it
    for file in old:
        file.unlink(missing_ok=True)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    print(f"{name}: started on {'the CPU' if device is None else f'GPU {device}'}", flush=True)
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0:
        (folder / RECORD).write_text(record_of(command), encoding="utf-8")
    ending = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-3:])
    print(f"{name}: exit {status}\n{ending}", flush=True)
    return status


def balance_scans(pipeline: Path) -> None:
    """Ask a pipeline's folder to balance scans at other sizes, as the embedded model does."""
    from gspn2_diffusion.evaluation.report import write_json

    index = pipeline / "model_index.json"
    write_json(json.loads(index.read_text(encoding="utf-8")) | {"balance_scans": True}, index)


def judge_all(given: argparse.Namespace, work: Path, names: Sequence[str]) -> dict[str, Any]:
    """The scores of every finished variant from one judge, which the first of them trains where needed."""
    judge = given.judge or given.work / "judge"
    extra = given.judge_options.split()

    def command(name: str) -> list[str]:
        options: dict[str, Any] = {
            "model": work / name / "pipeline",
            "data": given.data,
            "out": work / name / "evaluation",
            "judge": judge,
            "steps": given.sample_steps,
            "sprite_cache": given.sprite_cache,
        }
        if given.limit:
            options["limit"] = given.limit
        if given.sizes:
            options["sizes"] = given.sizes
        texts = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *texts, *extra]

    for name in names:
        balance_scans(work / name / "pipeline")
    folders = {name: work / name / "evaluation" for name in names}
    # The first one trains the judge, where there is none.
    run_all({name: command(name) for name in names}, folders, judge / "judge.json", given.at_once)
    found = {}
    for name in names:
        files = sorted((work / name / "evaluation").glob("results*.json"))
        found[name] = {path.stem: json.loads(path.read_text()) for path in files}
    return found


if __name__ == "__main__":
    main()
