"""Small folders of pictures with captions, in every layout that the trainer reads."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((16, 16), (24, 16), (16, 24), (20, 18))  # width, height
COLOURS = ("red", "blue", "apple", "rocket", "flat", "style", "on", "background")


def picture(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A smooth gradient of its own colour."""
    width, height = size or SIZES[number % len(SIZES)]
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    red = (number * 73 % 256) * np.ones_like(rows)
    values = np.stack([red, 255 * rows, 255 * columns * (number % 3) / 2], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def caption(number: int) -> str:
    return f"a {COLOURS[number % 8]} {COLOURS[(number * 3 + 1) % 8]}"


def png(number: int, size: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    picture(number, size).save(stream, format="PNG")
    return stream.getvalue()


def write_folder(folder: Path, count: int = 8, size: tuple[int, int] | None = None) -> Path:
    """Pictures and metadata.jsonl; every second picture has two captions."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number, size))
        texts = [caption(number), caption(number) + " style"][: 1 + number % 2]
        rows.append({"file_name": f"{number}.png", "text": texts})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_csv(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    lines = ["file_name,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        lines.append(f"{number}.png,{caption(number)}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_sidecars(folder: Path, count: int = 4) -> Path:
    """One caption a line in a text file beside each picture."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(caption(number) + "\n\nanother one\n")
    return folder


def write_webdataset(folder: Path, count: int = 4) -> Path:
    """Two shards; captions stand in the JSON."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as archive:
            for number in range(shard * count // 2, (shard + 1) * count // 2):
                entry = json.dumps({"caption": caption(number)}).encode()
                for ending, data in (("png", png(number)), ("json", entry)):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(folder: Path, count: int = 4) -> Path:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True)
    pictures = [{"bytes": png(number), "path": None} for number in range(count)]
    table = pyarrow.table({"image": pictures, "prompt": [caption(number) for number in range(count)]})
    parquet.write_table(table, folder / "0.parquet")
    return folder


def bomb(side: int) -> bytes:
    """A whole black PNG of one bit a pixel, made without ever holding its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj()
    line = bytes(1 + -(-side // 8))
    pixels = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def write_damaged(folder: Path) -> dict[str, str]:
    """Broken pictures of every kind and a word of each one's reason."""
    good = png(1)
    files = {
        "empty.png": (b"", "empty"),
        "short.png": (good[: len(good) // 2], "truncated"),
        "text.png": (b"no picture at all", "identify"),
        "bomb.png": (bomb(20000), "pixels"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}
