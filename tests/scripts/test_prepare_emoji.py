"""Emoji data: joins, splits, captions, drawing and the archive, on small packages made here."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from script_modules import load_script

from gspn2_diffusion.training.emoji import STYLES, load_records, rasterize
from gspn2_diffusion.training.emoji_names import NameIndex, build_concepts, plain_hex
from gspn2_diffusion.training.emoji_packages import (
    PACKAGES,
    Package,
    PackageError,
    iconify_pictures,
    iconify_svg,
    obtain,
    unpack,
)
from gspn2_diffusion.training.emoji_splits import assign_splits, concept_key, is_unseen_concept, style_family

pytest.importorskip("resvg")

RED_BOX = '<path fill="#f00" d="M2 3h4v2h-4z"/>'
NAMING = [
    {"label": "red apple", "hexcode": "1F34E", "emoji": "🍎", "group": 4, "tags": ["fruit", "red"]},
    {"label": "green apple", "hexcode": "1F34F", "emoji": "🍏", "group": 4, "tags": ["fruit"]},
    {"label": "cat", "hexcode": "1F408", "emoji": "🐈", "group": 3, "tags": ["pet"]},
    {"label": "cat face", "hexcode": "1F431", "emoji": "🐱", "group": 3, "tags": ["pet"]},
    {"label": "snowflake", "hexcode": "2744", "emoji": "❄️", "group": 5, "tags": ["cold"]},
    {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "emoji": "🇫🇷", "group": 9, "tags": []},
    {"label": "light skin tone", "hexcode": "1F3FB", "emoji": "🏻", "group": 2, "tags": []},
]
SHORTCODES = {
    "github": {
        "1F34E": "apple",
        "1F34F": "green_apple",
        "1F431": "cat",
        "1F408": "cat2",
        "2744": "snowflake",
    },
    "joypixels": {"1F431": ["cat", "kitty"], "1F408": ["housecat"]},
}
KEYWORDS = {"🍎": ["red_apple", "fruit"], "🐱": ["cat_face", "meow"], "❄️": ["snowflake", "ice"]}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/prepare_emoji.py", known=True)


# --- names and joins ---------------------------------------------------------------------------------------


def test_concepts_leave_out_flags_and_components_and_share_clusters() -> None:
    concepts = build_concepts(NAMING, SHORTCODES, KEYWORDS)
    assert set(concepts) == {"1F34E", "1F34F", "1F408", "1F431", "2744"}
    assert concepts["1F34E"].key == concepts["1F34F"].key == "apple"
    assert concepts["1F408"].key == concepts["1F431"].key == "cat"
    assert concepts["1F34E"].name == "red apple"
    assert "apple" in concepts["1F34E"].aliases
    assert "fruit" in concepts["1F34E"].tags


def test_an_alias_that_means_another_cluster_too_is_dropped() -> None:
    both = {"github": {"1F34E": "thing_here", "2744": "thing_here"}}
    concepts = build_concepts(NAMING, both, {})
    assert "thing here" not in concepts["2744"].aliases
    only = build_concepts(NAMING, {"github": {"2744": "thing_here"}}, {})
    assert "thing here" in only["2744"].aliases


def test_index_joins_slugs_aliases_and_numbered_variants_and_refuses_ambiguity() -> None:
    index = NameIndex(build_concepts(NAMING, SHORTCODES, KEYWORDS))
    index.add((row["label"], row["hexcode"]) for row in NAMING)
    index.add([("fruity", "1F34E"), ("fruity", "1F34F"), ("cat", "1F431"), ("kitty", "1F431")])
    assert index.find("red-apple") == index.find("redapple") == index.find("red-apple-2") == "1F34E"
    assert index.find("cat") == "1F408", "the earlier source of a name wins"
    assert index.find("kitty") == "1F431"
    assert index.find("fruity") is None
    assert index.find("flag-france") is None


@pytest.mark.parametrize(
    ("code", "plain"),
    [
        ("2744-fe0f", "2744"),
        ("a9", "A9"),
        ("0031-20e3", "31-20E3"),
        ("1f43b-200d-2744-fe0f", "1F43B-200D-2744"),
    ],
)
def test_hex_codes_compare_without_variation_selectors(code: str, plain: str) -> None:
    assert plain_hex(code) == plain


def test_iconify_svg_uses_the_icons_own_box_and_flips_aliases() -> None:
    icons = {
        "width": 8,
        "height": 8,
        "icons": {"left": {"body": RED_BOX, "width": 16}, "gone": {"body": "", "hidden": True}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
    }
    assert 'viewBox="0 0 16 8"' in str(iconify_svg(icons, "left"))
    assert 'transform="translate(16 0) scale(-1 1)"' in str(iconify_svg(icons, "right"))
    assert iconify_svg(icons, "gone") is None
    assert iconify_svg(icons, "unknown") is None


def test_listed_joins_go_before_names(tmp_path: Path) -> None:
    index = NameIndex(build_concepts(NAMING, SHORTCODES, KEYWORDS))
    index.add((row["label"], row["hexcode"]) for row in NAMING)
    write_json(tmp_path / "icons.json", {"icons": {"cat": {"body": RED_BOX}, "catside": {"body": RED_BOX}}})
    write_json(tmp_path / "chars.json", {})
    assert [found.hexcode for found in iconify_pictures(tmp_path, index)] == ["1F408"]
    joins = {"cat": "1F431", "catside": "1F408"}
    assert [found.hexcode for found in iconify_pictures(tmp_path, index, joins)] == ["1F431", "1F408"]


# --- splits ------------------------------------------------------------------------------------------------


def every_pair() -> list[tuple[str, str]]:
    return [(f"concept-{number}", style) for number in range(800) for style in STYLES]


def test_splits_do_not_depend_on_order_and_never_change() -> None:
    pairs = every_pair()
    splits = assign_splits(pairs)
    random.Random(0).shuffle(pairs)
    assert assign_splits(pairs) == splits
    # literal values: a change here means published held-out claims no longer hold
    assert is_unseen_concept("sunflower")
    assert is_unseen_concept("bicycle")
    assert not is_unseen_concept("apple")
    assert not is_unseen_concept("rocket")


def test_splits_are_disjoint_by_concept_and_family_and_about_five_percent() -> None:
    splits = assign_splits(every_pair())
    by_concept: dict[str, set[str]] = {}
    by_family: dict[tuple[str, str], set[str]] = {}
    for (concept, style), split in splits.items():
        by_concept.setdefault(concept, set()).add(split)
        by_family.setdefault((concept, style_family(style)), set()).add(split)
    assert all(found == {"unseen_concept"} for found in by_concept.values() if "unseen_concept" in found)
    assert all(len(found) == 1 for found in by_family.values()), "3d and flat are held out together"
    assert all("train" in found for found in by_concept.values() if "unseen_pair" in found)
    shares = {name: list(splits.values()).count(name) / len(splits) for name in set(splits.values())}
    assert 0.03 < shares["unseen_concept"] < 0.07
    assert 0.03 < shares["unseen_pair"] < 0.07


def test_a_pair_is_not_held_out_when_its_concept_has_no_other_family() -> None:
    fluent_only = assign_splits(
        [(f"concept-{number}", style) for number in range(800) for style in ("3d", "flat")]
    )
    assert "unseen_pair" not in fluent_only.values()
    assert "unseen_concept" in fluent_only.values()


@pytest.mark.parametrize(
    ("first", "second", "group"),
    [
        ("man astronaut", "woman astronaut", "people-body"),
        ("one o’clock", "ten-thirty", "travel-places"),
        ("red heart", "heart with arrow", "smileys-emotion"),
        ("blue book", "open book", "objects"),
        ("dog", "dog face", "animals-nature"),
    ],
)
def test_variants_of_one_thing_share_a_cluster(first: str, second: str, group: str) -> None:
    assert concept_key(first, group) == concept_key(second, group)


def test_different_things_do_not_share_a_cluster() -> None:
    names = [
        "hot dog",
        "dog",
        "rocket",
        "clock",
        "lock",
        "smiling face with heart-eyes",
        "red heart",
        "moon cake",
    ]
    keys = {concept_key(name, "objects") for name in [*names, "full moon"]} - {"clock"}
    assert len(keys) == len(names)


# --- the whole script --------------------------------------------------------------------------------------


def fake_roots(tmp_path: Path) -> dict[str, Path]:
    """Unpacked packages of the real layout, with a handful of pictures."""
    roots = {package.name: tmp_path / f"p{number}" for number, package in enumerate(PACKAGES)}
    slugs = {
        "red-apple": "1f34e",
        "green-apple": "1f34f",
        "cat": "1f408",
        "cat-face": "1f431",
        "snowflake": "2744-fe0f",
    }
    for package in PACKAGES:
        root = roots[package.name]
        root.mkdir()
        if package.style == "3d":
            (root / "assets").mkdir()
            for code in (*slugs.values(), "1f44b-1f3fb"):
                Image.new("RGBA", (16, 16), "red").save(root / "assets" / f"{code}.webp")
        elif package.style:
            ships_codes = package.style in ("flat", "noto", "twemoji")
            icons = {slug: {"body": RED_BOX} for slug in (*slugs, "no-such-thing")}
            write_json(root / "icons.json", {"icons": icons, "width": 32, "height": 32})
            write_json(
                root / "chars.json", {code: slug for slug, code in slugs.items()} if ships_codes else {}
            )
    english = roots["emojibase-data"] / "en"
    write_json(english / "data.json", NAMING)
    for kind in ("cldr", "github", "emojibase", "iamcal", "joypixels", "emojibase-legacy"):
        write_json(english / "shortcodes" / f"{kind}.json", SHORTCODES.get(kind, {}))
    write_json(roots["emojilib"] / "dist" / "emoji-en-US.json", KEYWORDS)
    return roots


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_build_pack_and_load_folder_and_archive(script: ModuleType, tmp_path: Path) -> None:
    roots = fake_roots(tmp_path)
    out = tmp_path / "data" / "emoji"
    report = script.replace_folder(out, lambda folder: script.build(roots, folder))
    assert report["pictures"] == 5 * 8
    assert report["damaged"] == []
    records = load_records(out)
    assert {row.name for row in records} == {"red apple", "green apple", "cat", "cat face", "snowflake"}
    assert all(row.path.is_file() for row in records)
    assert "CC-BY-4.0" in (out / "LICENSES.md").read_text()
    archives = [tmp_path / "one" / "emoji.tar.xz", tmp_path / "two" / "emoji.tar.xz"]
    for archive in archives:
        script.pack(out, archive)
    assert archives[0].read_bytes() == archives[1].read_bytes(), "the archive is reproducible"
    packed = load_records(archives[0])
    assert packed == records
    assert np.array_equal(rasterize(packed[0], 32), rasterize(records[0], 32))
    assert sorted(path.name for path in out.parent.iterdir()) == ["emoji"], "no temporary folder stays"


def test_a_failing_build_leaves_the_old_folder(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    out.mkdir()
    (out / "records.jsonl").write_text("old")

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise PackageError("no")

    with pytest.raises(PackageError):
        script.replace_folder(out, fail)
    assert [path.name for path in tmp_path.rglob("*")] == ["emoji", "records.jsonl"]


def test_many_damaged_pictures_stop_the_build(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bad.svg").write_text("<svg")
    with pytest.raises(PackageError, match=r"1 of 1 .*bad\.svg"):
        script.drop_damaged([{"file": "bad.svg"}], tmp_path)


def test_missing_npm_and_unsafe_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("some-package", "1.0.0", "MIT", "someone")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageError, match=r"npm is not installed.*some-package@1\.0\.0"):
        obtain(package, tmp_path)
    with tarfile.open(tmp_path / package.archive, "w:gz") as tar:
        info = tarfile.TarInfo("../outside")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(PackageError, match="cannot unpack"):
        unpack(obtain(package, tmp_path), tmp_path / "inner")
    assert not (tmp_path / "outside").exists()
