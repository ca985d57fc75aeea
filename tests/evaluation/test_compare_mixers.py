"""scripts/compare_mixers.py: what it trains, judges and collects, and what it does not do again."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_modules import load_script

from gspn2_diffusion.evaluation.comparison import variants
from gspn2_diffusion.evaluation.document import TRANSFER_SHEET, write_document
from gspn2_diffusion.training.sheets import contact_sheet, save_picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module():
    return load_script("scripts/compare_mixers.py")


def test_the_judged_pipelines_balance_their_scans(module, tmp_path):
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "GSPN2Pipeline", "balance_scans": False}))
    module.balance_scans(tmp_path)
    assert json.loads(index.read_text()) == {"_class_name": "GSPN2Pipeline", "balance_scans": True}


def test_the_sheet_of_sizes_shows_the_same_prompts_of_every_model(module, tmp_path, capsys):
    """Rows: one model after the other, small pictures first; a colour stands for model, size and prompt."""
    for model, red in (("gspn2", 50), ("softmax", 200)):
        folder = tmp_path / "mixers" / model / "evaluation"
        for name, side, green in (("", 256, 100), ("-512x512", 512, 180), ("-128x128", 128, 20)):
            folder.mkdir(parents=True, exist_ok=True)
            pictures = [Image.new("RGB", (8, 8), (red, green, 10 * number)) for number in range(20)]
            save_picture(
                contact_sheet(pictures, ["x"] * 20, columns=16, tile=128), folder / f"sheet{name}.png"
            )
            scores = {"settings": {"height": side, "width": side}}
            (folder / f"results{name}.json").write_text(json.dumps(scores))
    module.main(["sheet", "--work", str(tmp_path), "--document", str(tmp_path / "results.md")])
    with Image.open(tmp_path / TRANSFER_SHEET) as made:
        assert made.size == (120 + 10 * 136 + 8, 6 * 136 + 8)
        seen = [[made.getpixel((120 + 64 + 136 * x, 8 + 64 + 136 * y)) for x in (0, 9)] for y in range(6)]
    wanted = [[(r, g, 10 * x) for x in (0, 9)] for r in (50, 200) for g in (20, 100, 180)]
    assert np.abs(np.array(seen, int) - np.array(wanted, int)).max() < 12
    with pytest.raises(SystemExit, match="no sheets in"):
        module.main(["sheet", "--work", str(tmp_path), "--variants", "linear"])


@pytest.mark.parametrize("makes", [True, False])
def test_commands_wait_for_the_file_that_the_first_makes(module, tmp_path, monkeypatch, makes):
    """On several GPUs; without the file they start when the first has ended."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    needed = tmp_path / "judge.json"
    make = f"import time, pathlib; time.sleep(1); pathlib.Path({str(needed)!r}).touch(); time.sleep(1)"
    look = f"import sys, pathlib; sys.exit(0 if pathlib.Path({str(needed)!r}).is_file() else 3)"
    words = {"first": make if makes else "import sys; sys.exit(2)", "second": look, "third": look}
    commands = {name: [sys.executable, "-c", text] for name, text in words.items()}
    status = module.run_all(commands, {name: tmp_path / name for name in commands}, needed)
    expected = {"first": 0, "second": 0, "third": 0} if makes else {"first": 2, "second": 3, "third": 3}
    assert status == expected


def test_the_script_trains_all_variants_alike(module, tmp_path, monkeypatch):
    """The commands differ in the architecture and the folder alone; a failed run is reported."""
    seen = {}

    def run(name, command, log, device):
        seen[name] = command
        if name != "linear":
            (tmp_path / "work" / "mixers" / name).mkdir(parents=True, exist_ok=True)
            write_metrics(tmp_path / "work" / "mixers" / name)
        return 1 if name == "linear" else 0

    def write_metrics(folder):
        row = {"step": 7, "pictures": 70, "val_unseen_pair": 0.2}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(module, "_run_one", run)
    options = ["train", "--steps", "7", "--batch", "10", "--no-evaluate", "--work", tmp_path / "work"]
    module.main([str(o) for o in [*options, "--results", tmp_path / "results", "--", "--prefetch", "2"]])
    facts = json.loads((tmp_path / "results" / "mixers.json").read_text())
    assert facts["failed"] == ["linear"]
    assert set(facts["variants"]) == {"gspn2", "softmax", "hybrid"}
    runs = tmp_path / "work" / "mixers"
    plain = {name: [text.replace(str(runs / name), "RUN") for text in words] for name, words in seen.items()}
    assert plain["gspn2"] == plain["softmax"] == plain["hybrid"] == plain["linear"]
    assert plain["gspn2"][-2:] == ["--prefetch", "2"]
    assert plain["gspn2"][plain["gspn2"].index("--max_train_steps") + 1] == "7"
    one = ["--variants", "hybrid", "--results", tmp_path / "results", "--", "--prefetch", "2"]
    module.main([str(o) for o in [*options, *one]])  # a later call adds to the file
    facts = json.loads((tmp_path / "results" / "mixers.json").read_text())
    assert (list(facts["variants"]), facts["failed"]) == (["gspn2", "softmax", "hybrid"], [])
    module.main([str(o) for o in [*options, "--seed", "1", *one]])  # other settings do not mix
    assert list(json.loads((tmp_path / "results" / "mixers.json").read_text())["variants"]) == ["hybrid"]


def test_what_was_made_before_is_not_made_again(module, tmp_path, capfd):
    """A study that was stopped goes on where it was; what failed or was asked for otherwise runs again."""

    def run(**codes):
        commands = {
            name: [sys.executable, "-c", f"print('{name}'); raise SystemExit({code})"]
            for name, code in codes.items()
        }
        return module.run_all(commands, {name: tmp_path / name for name in commands})

    assert run(a=0, b=3) == {"a": 0, "b": 3}
    (tmp_path / "a" / "metrics.jsonl").write_text("kept")
    (tmp_path / "b" / "metrics.jsonl").write_text("of the run that failed")
    capfd.readouterr()
    assert run(a=0, b=3) == {"a": 0, "b": 3}
    said = capfd.readouterr().out
    assert "a: made before" in said
    assert "b: started on" in said
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == "kept"
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
    assert run(a=0) == {"a": 0}
    assert run(b=0) == {"b": 0}
    assert (tmp_path / "b" / "log.txt").read_text().split() == ["b", "b", "b"]


def test_a_run_that_was_cut_off_goes_on(module, tmp_path):
    """From the checkpoint that SIGTERM made it leave, with the metrics it had; not with other settings."""
    settings, run = tmp_path / "transformer.json", tmp_path / "a"
    words = (
        "import pathlib, sys; run = pathlib.Path(sys.argv[2]); print('options', sys.argv[3:]); "
        "made = run / 'checkpoint-3'; first = not made.exists(); made.mkdir(exist_ok=True); "
        "(made / 'state.json').touch(); (run / 'metrics.jsonl').open('a').write('x'); raise SystemExit(first)"
    )
    command = [sys.executable, "-c", words, str(settings), str(run)]

    def options(text):
        settings.write_text(text)
        status = module.run_all({"a": command}, {"a": run})["a"]
        return status, (run / "log.txt").read_text().splitlines()[-1]

    assert options("{}") == (1, "options []")
    assert options("{}") == (0, "options ['--resume_from', 'latest']")
    assert (run / "metrics.jsonl").read_text() == "xx"
    assert module.run_all({"a": command}, {"a": run}) == {"a": 0}  # made: not run again
    assert (run / "metrics.jsonl").read_text() == "xx"
    assert options('{"proxy_dim": 8}') == (1, "options []")
    assert (run / "metrics.jsonl").read_text() == "x"


def test_other_settings_under_the_same_name_are_another_run(module, tmp_path):
    """The command names files; what they say counts."""
    architecture, log = tmp_path / "transformer.json", tmp_path / "a" / "log.txt"
    command = [sys.executable, "-c", "print('ran')", str(architecture)]
    for text, runs in (("{}", 1), ("{}", 1), ('{"proxy_dim": 8}', 2)):
        architecture.write_text(text)
        module.run_all({"a": command}, {"a": tmp_path / "a"})
        assert log.read_text().count("ran") == runs


def test_runs_of_another_machine_are_collected(module, tmp_path):
    """Those that are whole and of these settings, in the order of the study."""
    base = json.loads((ROOT / "configs" / "gspn2-emoji-transformer.json").read_text())
    configs = variants("ablations", {k: v for k, v in base.items() if not k.startswith("_")})
    made = {"date": "2026-11-20T00:00:00", "commit": "abc", "gpu": "NVIDIA H200", "torch": "2.11.0"}
    for name, steps, config in (
        ("proxy-C/8", 8, configs["proxy-C/8"]),
        ("base", 8, configs["base"]),
        ("chunks-of-4", 7, configs["chunks-of-4"]),  # cut off
        ("chunks-of-8", 8, configs["chunks-of-4"]),  # of another architecture
    ):
        folder = tmp_path / "ablations" / name
        folder.mkdir(parents=True)
        last = {"step": steps, "pictures": 10 * steps, "val_unseen_pair": 0.5}
        (folder / "metrics.jsonl").write_text(f"{json.dumps(made)}\n{json.dumps(last)}\n")
        shape = {"_class_name": "GSPN2Transformer2DModel", **config}
        (folder / "transformer.json").write_text(json.dumps(shape))
        settings = {"max_train_steps": 8, "batch_size": 10, "seed": 0}
        (folder / "config.json").write_text(json.dumps(settings))
    options = ["collect", "--study", "ablations", "--work", tmp_path, "--results", tmp_path, "--steps", "8"]
    module.main([str(o) for o in [*options, "--batch", "10", "--at_once", "3", "--", "--prefetch", "2"]])
    facts = json.loads((tmp_path / "ablations.json").read_text())
    assert facts["settings"]["timed_alone"]
    assert facts["variants"]["base"]["step_milliseconds"] is None  # speeds beside other runs say nothing
    assert list(facts["variants"]) == ["base", "proxy-C/8"]
    assert facts["environment"] == made
    assert facts["settings"]["other"] == ["--prefetch", "2"]
    found = facts["variants"]["base"]
    assert (found["validation"][-1]["val_unseen_pair"], found["evaluation"]) == (0.5, None)
    text = write_document(tmp_path, tmp_path / "r.md").read_text()
    assert "| base | 21.42M | - | 0.5000 | +0.0% | - | - |\n" in text  # not judged, so without scores
    with pytest.raises(SystemExit, match="has no run of 8 steps with these settings"):
        module.main([str(o) for o in [*options, "--batch", "11"]])


def test_other_files_of_a_study_are_collected(module, tmp_path):
    """What is known stays, what is missing comes, each variant with where it was made."""

    def write(path, commit, variants, steps=8):
        settings = {"steps": steps, "batch": 10, "seed": 0, "other": []}
        facts = {"study": "ablations", "settings": settings, "variants": variants, "failed": []}
        made = {"date": "2026-11-20T00:00:00", "commit": commit, "gpu": "NVIDIA H200", "torch": "2.11.0"}
        path.write_text(json.dumps(facts | {"environment": made}))
        return path

    def run(loss, **facts):
        last = {"step": 8, "pictures": 80, "val_unseen_pair": loss}
        return {"parameters": 1000, "pictures": 80, "validation": [last], "evaluation": None, **facts}

    own = write(tmp_path / "ablations.json", "abc", {"base": run(0.5)})
    later = {"base": run(0.5, step_milliseconds=7.0, memory_gib=1.0), "proxy-C/8": run(0.6)}
    first = write(tmp_path / "1.json", "def", later)
    second = write(tmp_path / "2.json", "0f0", {"base": run(0.4, memory_gib=2.0), "proxy-C/2": run(0.3)})
    options = ["collect", "--study", "ablations", "--results", tmp_path, "--steps", "8", "--batch", "10"]
    module.main([str(o) for o in [*options, "--files", first, second]])
    found = json.loads(own.read_text())["variants"]
    assert list(found) == ["base", "proxy-C/2", "proxy-C/8"]
    assert {name: facts["made"]["commit"] for name, facts in found.items()} == {
        "base": "abc",
        "proxy-C/2": "0f0",
        "proxy-C/8": "def",
    }
    base = found["base"]  # of the second file it is another run
    assert (base["step_milliseconds"], base["memory_gib"]) == (7.0, 1.0)
    assert base["validation"][-1]["val_unseen_pair"] == 0.5
    before = own.read_text()
    other = write(tmp_path / "3.json", "abc", {"proxy-C/16": run(0.1)}, steps=9)
    with pytest.raises(SystemExit, match=r"3\.json has settings"):
        module.main([str(o) for o in [*options, "--files", other]])
    assert own.read_text() == before


def test_what_is_trained_is_written_at_once(module, tmp_path, monkeypatch):
    """A study that is cut off keeps what it knows."""

    def run(name, command, folder, device):
        if name == "softmax":
            raise KeyboardInterrupt
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 7, "pictures": 70, "val_unseen_pair": 0.2}\n')
        return 0

    monkeypatch.setattr(module, "_run_one", run)
    options = [
        "train",
        "--steps",
        "7",
        "--batch",
        "10",
        "--work",
        tmp_path,
        "--results",
        tmp_path / "results",
    ]
    with pytest.raises(KeyboardInterrupt):
        module.main([str(o) for o in options])
    assert "gspn2" in json.loads((tmp_path / "results" / "mixers.json").read_text())["variants"]


def test_a_study_needs_at_least_one_variant_at_once(module):
    with pytest.raises(SystemExit, match="compare_mixers: --at_once is 0; allowed: 1 or more"):
        module.main(["train", "--at_once", "0"])
