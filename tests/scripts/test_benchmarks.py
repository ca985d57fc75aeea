"""The benchmark programs, in small on a CPU: they run, runs add up, documents show what they wrote."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_pictures
import tiny_training
from PIL import Image
from training_forks import script

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import render
import scan_report
import size_report


def run(name, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    importlib.import_module(name).main()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_documents_show_the_results_that_are_committed():
    assert render.main(["--check"]) == 0


def test_marked_parts_are_written_and_nothing_else(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    row = {"pixels": 8, "error": 0.5, "error_of_means": 0.25}
    rows = [{**row, "balanced": False}, {**row, "balanced": True, "error": 0.125}]
    (results / "scan-balance.json").write_text(json.dumps({"rows": rows}))
    end = "<!-- end of the measurements -->"
    text = f"a\n<!-- measured: results/scan-balance.json -->\nold\n{end}\nb\n"
    text += (
        f"<!-- measured: results/models-x.json -->\n{end}\n<!-- measured: results/mine.json -->\nc\n{end}\n"
    )
    found = render.rendered(text, tmp_path)
    assert "| 8 | 0.500 | 0.125 | 0.250 | 0.250 |" in found
    assert "old" not in found
    assert f"models-x.json -->\n{render.MISSING}\n{end}" in found
    assert f"mine.json -->\nc\n{end}" in found
    assert render.rendered(found, tmp_path) == found


def test_the_readme_says_what_was_measured():
    """Its first page is typed by hand; every number of it that a result file holds is looked up there."""
    text = " ".join((render.ROOT / "README.md").read_text(encoding="utf-8").split())
    own, few = (read(render.RESULTS / f"evaluation-gspn2-emoji{end}.json")["scores"] for end in ("", "-few"))
    keys = ("concept_top1/seen", "style/seen", "background", "relation/pair", "count")
    said = [f"{own[key]['value']:.1%}" for key in keys]
    pairs = own["relation/pair"]
    assert f"the right thing in {said[0]} (pairs it was trained on), the right style in {said[1]}" in text
    assert f"the background colour in {said[2]}, two things recognised" in text
    assert f"in {pairs['value'] * pairs['count']:.0f} of {pairs['count']}, two to four" in text
    assert f"counted right in {said[4]}" in text
    *first, last = [f"{few[key]['value']:.1%}" for key in keys]
    assert f"these are {', '.join(first)} and {last}:" in text

    studied = read(render.RESULTS / "mixers.json")["variants"]
    models = ("gspn2", "softmax")
    seen = {
        name: [
            f"{studied[model]['evaluation'][name]['scores']['concept_top1/seen']['value']:.1%}"
            for model in models
        ]
        for name in ("results", "results-512x512")
    }
    losses = {name: f"{facts['validation'][-1]['val_unseen_pair']:.3f}" for name, facts in studied.items()}
    steps = [
        1000 * row["seconds_per_step"]
        for name in models
        for row in read(render.RESULTS / "training-nvidia-h200.json")["rows"]
        if (row["model"], row["tokens"], row["mixer"]) == ("0.6b", 16384, name) and not row["compiled"]
    ]
    sdxl = {
        row["variant"]: row["ms"] / 1000
        for row in read(render.RESULTS / "models-nvidia-h200.json")["rows"]
        if (row["family"], row["pixels"], row["mode"]) == ("sdxl", 16384, "eager")
    }
    assert f"seen pairs top-1 | {' | '.join(seen['results'])} |" in text
    assert f"drawing at 512 px | {' | '.join(seen['results-512x512'])} |" in text
    assert f"layers of attention: {losses['hybrid']} | {losses['gspn2']} | {losses['softmax']} |" in text
    assert f"at 16,384 tokens | {steps[0]:.0f} ms | {steps[1]:.0f} ms |" in text
    assert f"px, one step | {sdxl['gspn2']:.1f} s | {sdxl['attention']:.0f} s |" in text

    drawn = {
        (name, row["pixels"]): row
        for name in ("nvidia-h200", "cpu")
        for row in read(render.RESULTS / f"high-resolution-{name}.json")["rows"]
    }
    gpu = [f"{drawn['nvidia-h200', size]['seconds']:.0f} seconds" for size in (4096, 16384)]
    peak = drawn["nvidia-h200", 16384]["peak_bytes"] / 1e9
    cpu = [f"{drawn['cpu', size]['seconds']:.0f}" for size in (256, 1024)]
    assert f"4096 x 4096 px from a prompt in {gpu[0]} and 16384 x 16384 px in {gpu[1]}" in text
    assert f"with {peak:.0f} GB there" in text
    assert f"256 x 256 px in {cpu[0]} seconds (20 steps) and 1024 x 1024 px in {cpu[1]}." in text


def test_cases_of_two_layouts_stand_side_by_side():
    (path,) = (Path(render.__file__).parent / "results").glob("line_scan-*.json")
    result = read(path)
    row = {**result["cases"][0], "forward_ms": 2.0, "forward_target_ms": 1.0, "backward_ms": 4.0}
    row.pop("apart", None)
    other = {**row, "shape": [1, 8, 8, 8]}
    row["apart"] = {"forward_ms": 0.5, "backward_ms": 8.0}
    text = scan_report.render({**result, "cases": [row, other]})
    shape = ", ".join(map(str, row["shape"]))
    share = f"{row['forward_share_of_copy']:.0%}"
    assert f"\n| {shape} | 2 | 1 | {share} | **0.5** | 4 |" in text
    assert f"\n| 1, 8, 8, 8 | 2 | 1 | {share} |  | 4 |" in text
    table = [line for line in text.splitlines() if line.startswith(("| B, H, W, C | forward", "| 1, 8"))]
    assert {line.count("|") for line in table} == {10}


def test_reads_go_over_the_whole_picture(tmp_path):
    """Every wanted byte of a picture belongs to one thread of one block."""
    scan_reads = importlib.import_module("scan_reads")
    for layout, over_columns in itertools.product(scan_reads.LAYOUTS, (False, True)):
        way = scan_reads.walk(layout, over_columns)
        assert way.lines * way.positions * layout.pitch == way.picture
        assert max(way.line * way.lines, way.position * way.positions) == way.picture
        assert way.slices * way.vectors * 16 == layout.wanted
        assert way.stretch * way.vectors <= scan_reads.THREADS
        assert (way.stretches - 1) * way.stretch < way.positions <= way.stretches * way.stretch
        assert all(way.lines % ahead == 0 for ahead in scan_reads.AHEAD)
    facts = {"gpu": "X", "commit": "abcdef0123", "copy_bytes_per_second": 4e12}
    rates = [("rows", 2, 2e12), ("rows", 8, 3e12), ("columns", 2, 1e12), ("columns", 8, 1.2e12)]
    one = scan_reads.LAYOUTS[0]._asdict()
    one["written_bytes_per_second"] = 4e11
    facts["rows"] = [
        {**one, "scans": scans, "ahead": ahead, "read_bytes_per_second": rate} for scans, ahead, rate in rates
    ]
    (tmp_path / "scan_reads-x.json").write_text(json.dumps(facts))
    text = "<!-- measured: scan_reads-x.json -->\n<!-- end of the measurements -->\n"
    assert "| 1 channel | 16 | 16 | 16 | 75% | 30% | 10% | 10% |" in render.rendered(text, tmp_path)


def test_counters_are_read_from_what_ncu_prints(tmp_path):
    """As ncu prints its raw page: names, units, launches, and lines of its own around them."""
    profile_scan = importlib.import_module("profile_scan")
    names = ["ID", "Kernel Name", *profile_scan.COUNTERS.values()]
    launches = []
    for number, kernel in enumerate(("line_scan_forward_plane_2", "line_scan_backward_plane_2")):
        values = {name: float(n) for n, name in enumerate(profile_scan.COUNTERS)}
        values |= {"microseconds": 3_000_000.0, "read": 5e8, "written": 2.5e8, "wait": 99.0}
        launches.append([str(number), f"{kernel}(Parameters)", *(f"{v:,.2f}" for v in values.values())])
    rows = [names, ["", "", *["unit"] * len(profile_scan.COUNTERS)], *launches]
    page = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    forward, backward = profile_scan.read_counters(f"==PROF== Connected\n{page}\n==PROF== Disconnected\n")
    assert forward["kernel"] == "line_scan_forward_plane_2"
    assert forward["microseconds"] == 3_000_000
    row = profile_scan.summary((1, 1000, 1000, 1), "all", forward)
    assert row["ms"] == 3.0
    assert row["needed_bytes"] == 2 * 10**6 * (1 + 12 + 12)
    others = profile_scan.summary((1, 1000, 1000, 1), "columns", backward)
    assert others["needed_bytes"] == 2 * 10**6 * (2 + 12 + 12)
    assert next(iter(row["waits"])) == "wait"
    facts = {"gpu": "X", "commit": "abcdef0123", "rows": [row]}
    (tmp_path / "profile-x.json").write_text(json.dumps(facts))
    text = "<!-- measured: profile-x.json -->\n<!-- end of the measurements -->\n"
    assert "| 1, 1000, 1000, 1 | all | forward plane 2 | 3.000 | 15.00x |" in render.rendered(text, tmp_path)
    with pytest.raises(ValueError, match="printed no counters: none"):
        profile_scan.read_counters("none")
    with pytest.raises(ValueError, match=r"does not know .*dram__bytes_read\.sum"):
        profile_scan.read_counters(page.replace("dram__bytes_read.sum", "other"))
    unknown = profile_scan.read_counters(page.replace(profile_scan.COUNTERS["barrier"], "other"))
    assert unknown[0]["barrier"] == 0  # one of the reasons to wait, which not every ncu has


def test_models_are_compared_over_several_runs(tmp_path, monkeypatch):
    out = tmp_path / "models.json"
    common = ["--tiny", "--device", "cpu", "--families", "pixart", "--modes", "eager", "--out", out]
    run("models", monkeypatch, *common, "--sizes", 64, "--variants", "gspn2", "none")
    (alone,) = read(out)["comparisons"]
    assert (alone["complete"], alone["one_run"], alone["pixels"]) == (False, True, 64)
    run("models", monkeypatch, *common, "--sizes", 64, "--variants", "attention", "--commit", "other")
    result = read(out)
    assert [row["variant"] for row in result["rows"]] == ["gspn2", "none", "attention"]
    (whole,) = result["comparisons"]
    assert whole["complete"]
    assert whole["speedup"] == pytest.approx(result["rows"][2]["ms"] / result["rows"][0]["ms"])
    assert result["rows"][2]["commit"] == "other"
    assert "<polyline" in out.with_suffix(".svg").read_text()
    table = importlib.import_module("model_report").render(result)
    assert f"| pixart | 64 | eager | {result['rows'][2]['ms']:.1f} |" in table


def test_minutes_of_attention_are_compared_with_compiled_rows():
    models = importlib.import_module("models")
    row = {"family": "sdxl", "pixels": 16384, "finite": True, "peak_bytes": 40e9, "run": "a"}
    rows = [
        {**row, "variant": "gspn2", "mode": "compiled", "ms": 6000.0},
        {**row, "variant": "none", "mode": "compiled", "ms": 5000.0},
        {**row, "variant": "attention", "mode": "eager", "ms": 120000.0, "run": "b"},
    ]
    (found,) = models.compare(rows, [models.FAMILIES["sdxl"]])
    assert (found["over_none"], found["speedup"], found["met"]) == (1.2, 20.0, False)
    assert not found["one_run"]
    rows[0]["ms"] = 5500.0
    assert models.compare(rows, [models.FAMILIES["sdxl"]])[0]["met"]


def test_sizes_are_drawn_in_several_runs(tmp_path, monkeypatch):
    tiny_models.build_tiny_pipeline().save_pretrained(tmp_path / "model")
    out = tmp_path / "sizes.json"
    common = ["--device", "cpu", "--model", tmp_path / "model", "--steps", 4, "--out", out]
    common += ["--pictures", tmp_path, "--prompt", "a red apple", "--memory", "2GB"]
    run("high_resolution", monkeypatch, *common, "--sizes", 32, 16)
    run("high_resolution", monkeypatch, *common, "--sizes", 64, "--start", tmp_path / "32.png")
    rows = read(out)["rows"]
    assert [row["pixels"] for row in rows] == [16, 32, 64]
    assert [row["steps_run"] for row in rows] == [4, 6, 2]  # drawn; drawn and refined; refined only
    with Image.open(tmp_path / "64.png") as picture:
        assert picture.size == (64, 64)
    assert "| 64, refined from 32.png | " in size_report.sizes(read(out))


def test_one_picture_on_several_gpus_is_reported(tmp_path, monkeypatch):
    launched = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    launched["MASTER_PORT"] = 0  # a free one
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    out = tmp_path / "several.json"
    run("two_gpus", monkeypatch, "--tiny", "--device", "cpu", "--repeats", 1, "--out", out)
    (row,) = read(out)["rows"]
    assert row["relative_error"] < 1e-5
    assert f"| {row['pixels']} | {row['one_ms']:.1f} | 1 |" in size_report.several_gpus(read(out))


def test_distillation_reports_the_gap(tmp_path, monkeypatch):
    """Both trainings in this process, which is faster, with settings that make them tiny.

    The teacher begins with random gates, as in test_distill.py, and the student with random mixers, so that
    there is a gap for certain. Steps alone end the stages.
    """
    distillation = importlib.import_module("distillation")
    tiny_pictures.write_folder(tmp_path / "data", count=20, size=(16, 16))
    tiny_training.write_models(tmp_path / "models")
    tiny_models.tiny_transformer(mixer="softmax", num_layers=1).save_pretrained(tmp_path / "start")
    learnt = {"init_from": tmp_path / "start", "learning_rate": 1e-2, "ema_decay": 0.9, "max_train_steps": 40}
    special = {"train_text_to_image": learnt, "distill": {"stage1_steps": 4, "init": "random"}}

    def launch(name, options, more):
        script(name).main([*tiny_training.options(options), *more, *tiny_training.options(special[name])])
        return 30.0

    monkeypatch.setattr(distillation, "launch", launch)
    tiny = tiny_training.denoiser_options(tmp_path, tmp_path / "unused", max_train_steps=6)
    dropped = ("--output_dir", "--data", "--pretrained", "--max_train_minutes")
    pairs = [pair for pair in zip(tiny[::2], tiny[1::2], strict=True) if pair[0] not in dropped]
    more = [word for pair in pairs for word in pair]
    more += ["--sheet_prompts", "none", "--curated", "no", "--optimizer", "adamw"]
    out = tmp_path / "result.json"
    own = ["--data", tmp_path / "data", "--pretrained", tmp_path / "models", "--work", tmp_path / "work"]
    own += ["--teacher_minutes", 1000, "--stage1_minutes", 1000, "--student_minutes", 1000]
    own += ["--device", "cpu", "--out", out]
    distillation.main([*map(str, own), "--", *more])
    (row,) = read(out)["rows"]
    assert set(row["gap_closed"]) == {"train", "held_out"}
    assert all(row["ends"]["untrained"][name] > value for name, value in row["ends"]["teacher"].items())
    assert row["met"] == (min(row["gap_closed"].values()) >= 0.8)
    assert (row["seconds"], row["teacher_seconds"]) == (30.0, 30.0)
    assert "| 0.5 | " in importlib.import_module("training_report").distillation(read(out))


def test_a_student_that_starts_better_than_its_teacher_has_no_gap(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_train": 0.5}\n{"step": 4, "loss": 1.0}\n')
    ends = {"teacher": {"val_train": 0.6}, "untrained": {"val_train": 0.55}}
    found = importlib.import_module("distillation").closed(tmp_path / "metrics.jsonl", ends)
    assert (found["gap_closed"], found["met"]) == ({}, False)
    assert found["course"] == [{"step": 0, "val_train": 0.5}]
