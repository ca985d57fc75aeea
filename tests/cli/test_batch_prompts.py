"""Lists of prompts, wildcards, seeds and names: all that ``gspn2 batch`` decides without a model."""

from __future__ import annotations

import pytest

from gspn2_diffusion.batch import manifest, plan
from gspn2_diffusion.batch.prompts import Entry, PromptError, parse_prompts
from gspn2_diffusion.png_metadata import GenerationSettings

DEFAULTS = plan.Defaults("", None, None, 20, 4.0, None, 1)


def test_kohya_flags():
    (entry,) = parse_prompts("a cat, flat style --w 64 --h 32 --s 3 --l 2.5 --d 7 --n a dog, bad -- worse")
    assert entry == Entry("a cat, flat style", "a dog, bad -- worse", 32, 64, 3, 2.5, 7)


def test_web_ui_flags():
    line = '--prompt "a cat" --negative_prompt "x y" --cfg_scale 7 --steps 9 --seed 0 --n_iter 4'
    assert parse_prompts(line) == [Entry("a cat", "x y", None, None, 9, 7.0, 0, 4)]


def test_plain_lines():
    entries = parse_prompts("\ufeff# a note\r\n\r\n  a cat \r\nwell-known -- dashes, a--b\n")
    assert [(e.prompt, e.line) for e in entries] == [("a cat", 3), ("well-known -- dashes, a--b", 4)]


def test_json_lines_and_csv_say_the_same():
    as_json = '{"prompt": "a, b", "negative_prompt": "c", "width": 8, "guidance": 0}\n"just text"\n'
    as_csv = 'prompt,negative,w,cfg\n"a, b",c,8,0\njust text,,,\n'
    expected = [("a, b", "c", 8, 0.0), ("just text", None, None, None)]
    for text, form in ((as_json, "jsonl"), (as_json, "auto"), (as_csv, "csv")):
        assert [(e.prompt, e.negative, e.width, e.guidance) for e in parse_prompts(text, form)] == expected


@pytest.mark.parametrize(
    ("text", "form", "complaint"),
    [
        ("", "txt", "no prompt"),
        ("# only a note", "txt", "no prompt"),
        ("a cat\n--s 3", "txt", "line 2 has no prompt"),
        ("a cat --sedd 3", "txt", "line 1: --sedd is unknown"),
        ("a cat --s 0", "txt", "line 1: steps .* '0'"),
        ("a cat --s many", "txt", "'many'"),
        ("a cat --l nan", "txt", "guidance"),
        ("a cat --d -1", "txt", "seed"),
        ("{", "jsonl", "line 1 is not JSON"),
        ("3", "jsonl", "int"),
        ('{"prompt": "a", "colour": 1}', "jsonl", "'colour'"),
        ('{"prompt": "a", "steps": true}', "jsonl", "steps"),
        ('{"prompt": "a", "steps": 2.5}', "jsonl", "steps"),
        ('{"prompt": 3}', "jsonl", "prompt must be a text"),
        ("text\na", "csv", "'text'"),
        ("seed\n1", "csv", "'prompt'"),
        ("prompt,seed\na,1,2", "csv", "line 2 has more cells"),
    ],
)
def test_what_cannot_be_read(text, form, complaint):
    with pytest.raises(PromptError, match=complaint):
        parse_prompts(text, form)


def test_wildcards(tmp_path):
    (tmp_path / "colour.txt").write_text("red\nblue\ngreen\n")
    wildcards = plan.Wildcards(tmp_path)
    template = "a {big|small} __colour__ apple"
    drawn = [wildcards.resolve(template, seed, 1) for seed in range(40)]
    assert drawn == [wildcards.resolve(template, seed, 1) for seed in range(40)]
    allowed = {f"a {size} {colour} apple" for size in ("big", "small") for colour in ("red", "blue", "green")}
    assert set(drawn) == allowed
    assert wildcards.resolve("a # plain (one:1.2)", 1, 1) == "a # plain (one:1.2)"
    assert plan.Wildcards(enabled=False).resolve(template, 1, 1) == template


@pytest.mark.parametrize("template", ["a {red", "a __nothing__ b", "{}"])
def test_wildcards_that_cannot_be_resolved(template):
    with pytest.raises(PromptError, match="line 9"):
        plan.Wildcards().resolve(template, 1, 9)


def expand(*lines: str, base: int = 1, defaults: plan.Defaults = DEFAULTS) -> list[plan.Picture]:
    return plan.expand(parse_prompts("\n".join(lines)), defaults, base, plan.Wildcards())


def test_seeds_stay_when_the_list_changes():
    seeds = {p.prompt: p.seed for p in expand("a", "b", "c")}
    assert {p.prompt: p.seed for p in expand("new", "c", "a", "b")}.items() > seeds.items()
    assert len({p.seed for p in expand("a", "a", "a")}) == 3
    assert {p.seed for p in expand("a", "b", base=2)}.isdisjoint(seeds.values())
    assert [p.seed for p in expand("a --d 5 --count 3")] == [5, 6, 7]
    with pytest.raises(PromptError, match="passes"):
        expand(f"a --d {2**63 - 1} --count 2")


def jobs(pictures: list[plan.Picture], template: str = "{index:05d}-{seed}") -> list[plan.Job]:
    settings = [
        GenerationSettings(
            p.prompt, p.negative, p.steps, p.guidance, p.seed, p.height or 16, p.width or 16, "m", "h", "s"
        )
        for p in pictures
    ]
    return plan.make_jobs(list(zip(pictures, settings, strict=True)), template, ".png")[0]


def test_names():
    pictures = expand("A cat: ../x --d 1 --w 8", "a CAT; x --d 2")
    assert [job.file for job in jobs(pictures)] == ["00001-1.png", "00002-2.png"]
    same = jobs(pictures, "{prompt}")  # two names that differ in case only
    assert [job.file for job in same] == [
        f"A-cat-x-{same[0].key[:16]}.png",
        f"a-CAT-x-{same[1].key[:16]}.png",
    ]
    assert jobs(pictures[:1], "{prompt}/{width}")[0].file == "A-cat-x/8.png"
    for bad in ("../{seed}", "/{seed}", "{sed}", "{seed", "{seed:x.}", ".{seed}", "{prompt.upper}", ""):
        with pytest.raises(ValueError, match=r"file name|inside"):
            plan.check_template(bad)


def test_every_setting_makes_another_picture_and_twice_the_same_is_one():
    lines = ["a", "b", "a --n x", "a --s 3", "a --l 2", "a --w 8", "a --h 8"]
    seeded = plan.Defaults("", None, None, 20, 4.0, 5, 1)
    assert len({job.key for job in jobs(expand(*lines, defaults=seeded))}) == len(lines)
    assert len(jobs(expand("a", "a", "a --l 4", defaults=seeded))) == 1


def test_shares_are_disjoint_complete_and_even():
    every = jobs(expand(*(f"a {k} --w {8 * (1 + k % 3)}" for k in range(20))))
    shares = [plan.share(every, rank, 3) for rank in range(3)]
    assert sorted(job.key for share in shares for job in share) == sorted(job.key for job in every)
    for width in (8, 16, 24):
        counts = [sum(job.settings.width == width for job in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_manifest_survives_torn_lines(tmp_path):
    manifest.append(tmp_path, [{"key": "a", "status": "failed"}, {"key": "b", "status": "done"}])
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"key": "torn", "sta')
    manifest.append(tmp_path, [{"key": "a", "status": "done"}])
    status = {key: record["status"] for key, record in manifest.read(tmp_path).items()}
    assert status == {"a": "done", "b": "done"}


def test_one_run_at_a_time(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from gspn2_diffusion.batch import manifest\n"
        "with manifest.occupy(Path(sys.argv[1]), int(sys.argv[2])): print('in')"
    )
    with manifest.occupy(tmp_path, 0):
        for rank, inside in ((0, False), (1, True)):
            done = subprocess.run(
                [sys.executable, "-c", code, tmp_path, str(rank)], capture_output=True, text=True
            )
            assert (done.stdout == "in\n") is inside, done.stderr


def test_folder_keeps_its_base_seed(tmp_path):
    assert manifest.base_seed(tmp_path) == manifest.base_seed(tmp_path)
    assert manifest.base_seed(tmp_path, store=False) == manifest.base_seed(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == [".gspn2-batch.json"]
