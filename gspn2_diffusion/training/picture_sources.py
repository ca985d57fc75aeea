"""Pictures with captions from folders, parquet, webdataset shards and the Hub, read by ``datasets``."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspn2_diffusion.training.config import ConfigError

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture")


@dataclass(frozen=True)
class Item:
    """One picture.

    Attributes:
        name: what messages call it: a path, or a place in a shard.
        key: changes whenever the content may have changed.
        read: gives the file's bytes; OSError where it cannot be read.
        captions: none, one or several.
    """

    name: str
    key: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]


def find_format(data: str) -> str:
    """Which of `DATA_FORMATS` a path or name is.

    Raises:
        ConfigError: a path that is not there, or a folder without any picture data.
    """
    path = Path(data)
    if path.suffix == ".xz" or (path / "records.jsonl").is_file():
        return "emoji"
    if not path.exists():
        if "*" in data:
            return "webdataset" if data.endswith(".tar") else "parquet"
        if data.count("/") == 1 and not data.startswith((".", "~", "data/")):
            return "hub"
        raise ConfigError(f"`data`: there is no {data}")
    names = [data] if path.is_file() else [item.name for item in path.iterdir()]
    for ending, kind in ((".parquet", "parquet"), (".tar", "webdataset")):
        if any(name.endswith(ending) for name in names):
            return kind
    return "folder"


def open_items(
    data: str, kind: str, image_column: str | None, caption_column: str | None, split: str = "train"
) -> Iterator[Item]:
    """All pictures of a data set, streamed: nothing is copied and memory stays flat.

    Args:
        data: folder, file, pattern or Hub name.
        kind: one of `DATA_FORMATS` but "emoji" and "auto".
        image_column: column of the picture; None finds it.
        caption_column: column of the caption or list of captions; None finds it.
        split: split of a Hub data set.

    Raises:
        ConfigError: `datasets` is not installed, or the data are empty or lack a column.
    """
    rows = _open(data, kind, split)
    sidecars = kind == "folder" and not _metadata_files(Path(data))
    columns: tuple[str, str | None] | None = None
    for number, row in enumerate(rows):
        if isinstance(row.get("json"), dict):  # captions of many webdatasets stand in there
            row = {**row["json"], **row}
        if columns is None:
            columns = _columns(data, row, image_column, caption_column, sidecars)
        yield _item(data, number, row, columns[0], columns[1])
    if columns is None:
        raise ConfigError(f"`data`: {data} holds no pictures")


def _open(data: str, kind: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("reading pictures needs the package datasets: pip install datasets") from error
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a server is told of local folders, too
    options: dict[str, Any] = {"split": split if kind == "hub" else "train", "streaming": True}
    if kind == "folder":
        sidecars = not _metadata_files(Path(data))
        options |= {"data_dir": data, "drop_labels": True, "drop_metadata": sidecars}
    elif kind != "hub":
        ending = {"parquet": "*.parquet", "webdataset": "*.tar"}[kind]
        options["data_files"] = {"train": str(Path(data) / ending) if Path(data).is_dir() else data}
    name = {"folder": "imagefolder", "hub": data}.get(kind, kind)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # a stream keeps nothing; the home may be read-only
            if kind != "hub":
                options["cache_dir"] = scratch
            found = datasets.load_dataset(name, **options)
        for column, feature in (found.features or {}).items():
            if isinstance(feature, datasets.Image):  # damaged ones must not end the run, so we decode
                found = found.cast_column(column, datasets.Image(decode=False))
        return found
    except Exception as error:  # datasets has a dozen ways to say that there is nothing
        raise ConfigError(f"`data`: {data} cannot be read as {kind}: {error}") from error


def _metadata_files(folder: Path) -> list[Path]:
    names = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
    return [path for name in names for path in folder.rglob(name)]


def _columns(
    data: str, row: dict[str, Any], image: str | None, caption: str | None, sidecars: bool
) -> tuple[str, str | None]:
    """Names of the picture's and the caption's column; no caption column where text files have them."""
    image = image or next((name for name in IMAGE_COLUMNS if name in row), None)
    if image is None or image not in row:
        raise ConfigError(f"`image_column`: {data} has the columns {', '.join(row)}; name one of them")
    if sidecars and caption is None:
        return image, None
    found = caption or next((name for name in CAPTION_COLUMNS if name in row), None)
    if caption is not None and caption not in row:
        raise ConfigError(f"`caption_column` is {caption!r}; {data} has the columns {', '.join(row)}")
    return image, found


def _item(data: str, number: int, row: dict[str, Any], image: str, caption: str | None) -> Item:
    value = row[image]
    content = value.get("bytes") if isinstance(value, dict) else value
    path = value.get("path") if isinstance(value, dict) else None
    name = str(row.get("__key__") or path or f"{data}[{number}]")
    captions = _texts(row.get(caption)) if caption else _sidecar(path)
    if content is not None:
        data_bytes = bytes(content)
        key = hashlib.blake2b(data_bytes, digest_size=16).hexdigest()
        return Item(name, key, lambda: data_bytes, captions)
    return Item(name, _file_key(path), lambda: Path(str(path)).read_bytes(), captions)


def _file_key(path: str | None) -> str:
    """Path, size and time of change, so that a run that finds everything cached reads no picture."""
    try:
        found = os.stat(str(path))
    except OSError:
        return f"{path}|missing"
    return f"{os.path.abspath(str(path))}|{found.st_size}|{found.st_mtime_ns}"


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(text).strip() for text in values if text is not None and str(text).strip())


def _sidecar(path: str | None) -> tuple[str, ...]:
    """Captions of ``picture.txt`` beside ``picture.jpg``, one a line."""
    if path is None:
        return ()
    file = Path(path).with_suffix(".txt")
    if not file.is_file():
        return ()
    return _texts(file.read_text(encoding="utf-8", errors="replace").splitlines())
