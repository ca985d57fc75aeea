"""Train several mixers (or ablations) from the same seed and data order, judge them, and write the tables.

    python scripts/compare_mixers.py train --study mixers --pretrained gspn2-emoji --steps 2000 --batch 512
    python scripts/compare_mixers.py report
    python scripts/compare_mixers.py sheet --variants gspn2,softmax
    python scripts/compare_mixers.py collect --study ablations --work runs/comparison --steps 400

"train" runs one variant per GPU at a time, each for exactly --steps steps, then lets one judge see all their
pictures. It writes benchmarks/results/<study>.json as soon as one has been trained and whenever more is
known. Variants that the file holds already stay in it, if they were trained with the same settings, so a
study may be made in several calls; runs and judgements that --work holds from a call that was cut off are not
repeated, and a run that SIGTERM cut off goes on from its checkpoint. With --at_once variants share a GPU,
since setting up a short run takes longer than training it; steps are then timed at the end, with the GPU to
themselves. "collect" takes into that file what runs measured that lie in --work, from another machine
perhaps, or with --files what other files of the study know; it wants the options of the training. "report"
makes docs/results.md from the files in benchmarks/results; "sheet" makes docs/results-transfer.webp from the
sheets that judging at several --sizes left in --work. Options after "--" go to
scripts/train_text_to_image.py unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspn2_diffusion.evaluation.study_file import StudyFile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECORD = "command.json"  # in the folder of what a command made, once it ended well
STARTED = "started.json"  # there, too, of the command that was started last


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
        if given.action == "collect":
            collect(given, passed)
        else:
            train(given, passed)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"compare_mixers: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("train", "collect", "report", "sheet"))
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
    add("--files", type=Path, nargs="+", default=[], help="for collect: result files of the same study")
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
    from gspn2_diffusion.evaluation.comparison import count_parameters

    configs = asked_for(given)
    for name, config in configs.items():
        print(f"{name}: {count_parameters(config):,} parameters", flush=True)
    work = given.work / given.study
    file = study_file(given, passed, describe_environment())
    commands = {name: _training(given, work / name, config, passed) for name, config in configs.items()}
    folders = {name: work / name for name in configs}

    def trained(name: str) -> None:
        file.add_run(name, configs[name], folders[name])

    status = run_all(commands, folders, at_once=given.at_once, made=trained)
    finished = [name for name in configs if status[name] == 0]
    if given.evaluate and finished:
        file.add({name: {"evaluation": scores} for name, scores in judge_all(given, work, finished).items()})
    if given.at_once > 1:
        file.add(time_alone({name: facts["config"] for name, facts in file.variants.items()}))
    failed = [name for name in configs if status[name] != 0]
    file.finish(failed)
    print(f"wrote {file.path}; failed: {failed or 'none'}")
    return file.path


def collect(given: argparse.Namespace, passed: Sequence[str]) -> None:
    """Take in what other files know, or the runs of --work that reached the last step with these settings.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is of other settings.
    """
    for path in given.files:
        environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
        print(f"{path}: {', '.join(study_file(given, passed, environment).take(path)) or 'nothing new'}")
    if given.files:
        return
    work, names = given.work / given.study, []
    for name, config in asked_for(given).items():
        run = finished_run(given, work / name, config)
        if run:
            study_file(given, passed, run).add_run(name, config, work / name)
            names.append(name)
    if not names:
        raise FileNotFoundError(f"{work} has no run of {given.steps} steps with these settings")
    print(f"collected {', '.join(names)}")


def finished_run(given: argparse.Namespace, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Where a run was made, or nothing if it is not a whole one of this architecture and these settings."""
    from gspn2_diffusion.environment import describe_environment

    files = [folder / name for name in ("metrics.jsonl", "transformer.json", "config.json")]
    if not all(file.is_file() for file in files):
        return {}
    rows = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()]
    architecture, settings = (json.loads(file.read_text(encoding="utf-8")) for file in files[1:])
    wanted = {"max_train_steps": given.steps, "batch_size": given.batch, "seed": given.seed}
    same = all(settings[key] == value for key, value in wanted.items())
    same = same and architecture == {"_class_name": "GSPN2Transformer2DModel", **config}
    whole = any(row.get("step") == given.steps and "val_unseen_pair" in row for row in rows)
    return {key: rows[0][key] for key in describe_environment() if key in rows[0]} if same and whole else {}


def asked_for(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Configurations of the variants, by name.

    Raises:
        ValueError: a variant that the study does not have, or ``--at_once`` below 1.
    """
    from gspn2_diffusion.evaluation.comparison import variants

    if given.at_once < 1:
        raise ValueError(f"--at_once is {given.at_once}; allowed: 1 or more")
    configs = variants(given.study, read_base(given), more=bool(given.variants))
    if not given.variants:
        return configs
    unknown = set(given.variants.split(",")) - configs.keys()
    if unknown:
        raise ValueError(f"--variants has {sorted(unknown)}; allowed: {', '.join(configs)}")
    return {name: configs[name] for name in given.variants.split(",")}


def read_base(given: argparse.Namespace) -> dict[str, Any]:
    """The configuration that all variants are changes of."""
    return {k: v for k, v in json.loads(given.base.read_text()).items() if not k.startswith("_")}


def study_file(given: argparse.Namespace, passed: Sequence[str], environment: dict[str, Any]) -> StudyFile:
    """The results file, for variants trained with these settings."""
    from gspn2_diffusion.evaluation.comparison import variants
    from gspn2_diffusion.evaluation.study_file import StudyFile

    settings = {"steps": given.steps, "batch": given.batch, "seed": given.seed, "other": list(passed)}
    if given.at_once > 1:  # steps are timed in another way, so those of one file are all timed so
        settings["timed_alone"] = True
    named = {"commit": given.commit} if given.commit else {}
    path = given.results / f"{given.study}.json"
    order = list(variants(given.study, read_base(given), more=True))
    return StudyFile(path, given.study, settings, environment | named, order)


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
    return {
        name: {"step_milliseconds_alone": measured.get(name), "step_pictures_alone": BATCH}
        for name in configs
    }


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
    made: Callable[[str], None] = lambda name: None,
) -> dict[str, int]:
    """Run commands, `at_once` per GPU (one after the other without GPUs); exit status by name.

    Args:
        commands: by name; not run are those that made their folder before.
        folders: what each of them fills.
        needed: a file that the first command makes; the others start once it is there, or that one has ended.
        made: called as soon as a folder is known to be filled.
    """
    import torch

    free: Queue[int | None] = Queue()
    for device in (list(range(torch.cuda.device_count())) or [None]) * at_once:  # type: ignore[list-item]
        free.put(device)
    left = []
    for name, command in commands.items():
        if is_made(folders[name], command):
            print(f"{name}: made before", flush=True)
            made(name)
        else:
            left.append(name)
    first, first_ended = next(iter(left), None), threading.Event()

    def run(name: str) -> int:
        device = free.get()
        try:
            while name != first and needed and not needed.is_file() and not first_ended.wait(0.5):
                pass
            status = _run_one(name, commands[name], folders[name], device)
            if status == 0:
                made(name)
            return status
        finally:
            if name == first:
                first_ended.set()
            free.put(device)

    with ThreadPoolExecutor(max(1, free.qsize())) as pool:
        return dict.fromkeys(commands, 0) | dict(zip(left, pool.map(run, left), strict=True))


def _run_one(name: str, command: list[str], folder: Path, device: int | None) -> int:
    from gspn2_diffusion.training.checkpoint import checkpoints

    environment, log = dict(os.environ), folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    started, record = folder / STARTED, record_of(command)
    again = started.is_file() and started.read_text(encoding="utf-8") == record and checkpoints(folder)
    old = folder.rglob(RECORD)  # of an earlier try, and of what was judged of it
    for file in [*old, *([] if again else [folder / "metrics.jsonl"])]:
        file.unlink(missing_ok=True)
    if again:  # SIGTERM made it leave a checkpoint
        command = [*command, "--resume_from", "latest"]
    else:
        for checkpoint in checkpoints(folder):  # of other settings
            shutil.rmtree(checkpoint)
        started.write_text(record, encoding="utf-8")
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    print(f"{name}: started on {'the CPU' if device is None else f'GPU {device}'}", flush=True)
    with log.open("a", encoding="utf-8") as stream:
        status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0:
        (folder / RECORD).write_text(record, encoding="utf-8")
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
