"""PNG and TIFF files written strip by strip, so that a picture need never be in memory as a whole.

Pillow cannot do that. Both formats are simple where only their common core is wanted: 8-bit RGB, deflated
without loss. Rows come as arrays ``(rows, width, 3)`` uint8, from the top; the file appears under its name
when the last row is in.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from typing_extensions import Self

from gspn2_diffusion.files import atomic_path

SUFFIXES = (".png", ".tif", ".tiff")
_LEVEL = 6
_PNG_CHUNK = 1 << 20
_CLASSIC_TIFF_LIMIT = 0xF0000000  # offsets of 32 bits, less what stands around the strips
_PNG_LIMIT = 2**31 - 1


class StripWriter:
    """Writes one picture; use as a context manager. A block that fails leaves no file behind.

    Args:
        path: the file; its folder must exist.
        width, height: pixels.

    Raises:
        OSError: it cannot be written, or the disk has less space than an incompressible picture would take.
        ValueError: a size out of range.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int) -> None:
        for name, value in (("width", width), ("height", height)):
            if not 1 <= value <= _PNG_LIMIT:
                raise ValueError(f"`{name}` must be from 1 to {_PNG_LIMIT}, got {value}")
        self.path, self.width, self.height = Path(path), width, height
        self.rows_written = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        check_disk_space(self.path, self.width, self.height)
        temporary = self._stack.enter_context(atomic_path(self.path))
        self._file: BinaryIO = self._stack.enter_context(temporary.open("wb"))
        try:
            self._begin()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and self.rows_written == self.height:
            try:
                self._end()
            except BaseException:
                self._abandon()
                raise
            self._stack.close()
            return
        self._abandon()
        if kind is None:
            raise ValueError(f"{self.rows_written} rows came of {self.height} for {str(self.path)!r}")

    def _abandon(self) -> None:
        error = RuntimeError("abandoned")
        self._stack.__exit__(RuntimeError, error, None)  # removes the temporary file

    def write(self, rows: np.ndarray) -> None:
        """Append ``rows (n, width, 3)`` uint8.

        Raises:
            ValueError: another shape or dtype, or more rows than the picture has.
            OSError: the disk is full.
        """
        if rows.ndim != 3 or rows.shape[1:] != (self.width, 3) or rows.dtype != np.uint8:
            raise ValueError(f"rows must be (n, {self.width}, 3) uint8, got {rows.shape} {rows.dtype}")
        if self.rows_written + len(rows) > self.height:
            raise ValueError(f"{self.rows_written + len(rows)} rows came, the picture has {self.height}")
        if len(rows):
            self._write(np.ascontiguousarray(rows))
        self.rows_written += len(rows)

    def _begin(self) -> None:
        raise NotImplementedError

    def _write(self, rows: np.ndarray) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError


class PngStripWriter(StripWriter):
    """PNG (ISO/IEC 15948); each row gets the one of three filters that leaves the smallest differences.

    Args:
        path, width, height: see :class:`StripWriter`.
        texts: keyword to text, stored as iTXt chunks. Keywords are Latin-1, 1 to 79 characters.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, width, height)
        self._texts = dict(texts or {})

    def _begin(self) -> None:
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0))
        for keyword, text in self._texts.items():
            self._chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode())
        self._deflate = zlib.compressobj(_LEVEL)
        self._waiting = bytearray()
        self._above = np.zeros((1, self.width * 3), np.uint8)

    def _write(self, rows: np.ndarray) -> None:
        flat = rows.reshape(len(rows), -1)
        self._waiting += self._deflate.compress(_filter(flat, self._above).tobytes())
        self._above = flat[-1:].copy()
        self._flush(_PNG_CHUNK)

    def _end(self) -> None:
        self._waiting += self._deflate.flush()
        self._flush(1)
        self._chunk(b"IEND", b"")

    def _flush(self, least: int) -> None:
        while len(self._waiting) >= least:
            self._chunk(b"IDAT", bytes(self._waiting[:_PNG_CHUNK]))
            del self._waiting[:_PNG_CHUNK]

    def _chunk(self, kind: bytes, data: bytes) -> None:
        check = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check))


def _filter(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """``rows (n, width*3)`` as PNG scanlines ``(n, 1 + width*3)``; ``above (1, width*3)`` precedes them."""
    left = np.zeros_like(rows)
    left[:, 3:] = rows[:, :-3]
    up = np.concatenate((above, rows[:-1]))
    best = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    cost = np.full(len(rows), np.inf)
    for code, filtered in ((0, rows), (1, rows - left), (2, rows - up)):
        # Bytes are signed differences: 255 is as near to 0 as 1 is.
        size = np.minimum(filtered, 0 - filtered).sum(axis=1, dtype=np.uint64).astype(float)
        better = size < cost
        cost[better] = size[better]
        best[better, 0] = code
        best[better, 1:] = filtered[better]
    return best


class TiffStripWriter(StripWriter):
    """TIFF 6.0 with deflate and horizontal differences; BigTIFF where 32-bit offsets could overflow.

    Args:
        path, width, height: see :class:`StripWriter`.
        description: the ImageDescription tag, stored as UTF-8.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int, description: str = "") -> None:
        super().__init__(path, width, height)
        self._description = description.encode() + b"\0"
        self._big = _worst_case(width, height) > _CLASSIC_TIFF_LIMIT
        self._strips: list[tuple[int, int, int]] = []  # offset, bytes, rows
        self._rows_per_strip = max(1, (1 << 20) // (width * 3))

    def _begin(self) -> None:
        header = (
            struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if self._big else struct.pack("<2sHI", b"II", 42, 0)
        )
        self._file.write(header)
        self._pending = np.empty((0, self.width, 3), np.uint8)

    def _write(self, rows: np.ndarray) -> None:
        self._pending = np.concatenate((self._pending, rows)) if len(self._pending) else rows
        while len(self._pending) >= self._rows_per_strip:
            self._strip(self._pending[: self._rows_per_strip])
            self._pending = self._pending[self._rows_per_strip :]
        self._pending = self._pending.copy()

    def _strip(self, rows: np.ndarray) -> None:
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]
        data = zlib.compress(differences.tobytes(), _LEVEL)
        self._strips.append((self._file.tell(), len(data), len(rows)))
        self._file.write(data + b"\0" * (len(data) % 2))  # offsets are even

    def _end(self) -> None:
        if len(self._pending):
            self._strip(self._pending)
        offset_type, size = (16, 8) if self._big else (4, 4)
        entries: list[tuple[int, int, list[int] | bytes]] = [
            (256, 4, [self.width]),
            (257, 4, [self.height]),
            (258, 3, [8, 8, 8]),  # bits per sample
            (259, 3, [8]),  # deflate
            (262, 3, [2]),  # RGB
            (270, 2, self._description),
            (273, offset_type, [offset for offset, _, _ in self._strips]),
            (277, 3, [3]),  # samples per pixel
            (278, 4, [self._rows_per_strip]),
            (279, offset_type, [count for _, count, _ in self._strips]),
            (284, 3, [1]),  # samples side by side
            (317, 3, [2]),  # horizontal differences
        ]
        directory = self._directory(entries, size)
        self._file.seek(8 if self._big else 4)
        self._file.write(struct.pack("<Q" if self._big else "<I", directory))

    def _directory(self, entries: list[tuple[int, int, list[int] | bytes]], size: int) -> int:
        """Writes the values that do not fit into their entries, then the directory; returns its offset."""
        offset = "<Q" if self._big else "<I"
        table = []
        for tag, kind, values in entries:
            data = values if isinstance(values, bytes) else _pack(kind, values)
            count = len(values)
            if len(data) > size:
                place = self._file.seek(0, os.SEEK_END)
                self._file.write(data + b"\0" * (len(data) % 2))
                data = struct.pack(offset, place)
            table.append(struct.pack("<HH" + offset[1], tag, kind, count) + data.ljust(size, b"\0"))
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(struct.pack("<Q" if self._big else "<H", len(table)) + b"".join(table))
        self._file.write(struct.pack(offset, 0))  # no further picture
        return start


def _pack(kind: int, values: Iterable[int]) -> bytes:
    code = {3: "H", 4: "I", 16: "Q"}[kind]
    values = list(values)
    return struct.pack(f"<{len(values)}{code}", *values)


def _worst_case(width: int, height: int) -> int:
    """Bytes of a file whose picture does not compress at all."""
    raw = (width * 3 + 1) * height
    return raw + raw // 1000 + (1 << 16)


def check_disk_space(path: str | os.PathLike[str], width: int, height: int) -> None:
    """Raises ``OSError`` unless the disk of ``path`` can take the picture even if it does not compress."""
    folder = Path(path).absolute().parent
    free, needed = shutil.disk_usage(folder).free, _worst_case(width, height)
    if needed > free:
        raise OSError(
            f"a picture of {width} x {height} pixels may take {needed / 1e9:.2f} GB, the disk of "
            f"{str(folder)!r} has {free / 1e9:.2f} GB left"
        )


def open_strip_file(
    path: str | os.PathLike[str], width: int, height: int, texts: Mapping[str, str] | None = None
) -> StripWriter:
    """A writer by the ending of ``path``: one of :data:`SUFFIXES`. A TIFF takes the first text only.

    Raises:
        ValueError: another ending.
    """
    suffix = Path(path).suffix.lower()
    writers: dict[str, Callable[[], StripWriter]] = {
        ".png": lambda: PngStripWriter(path, width, height, texts),
        ".tif": lambda: TiffStripWriter(path, width, height, next(iter((texts or {"": ""}).values()))),
    }
    writers[".tiff"] = writers[".tif"]
    if suffix not in writers:
        raise ValueError(f"the file must end in {', '.join(SUFFIXES)}, got {os.fspath(path)!r}")
    return writers[suffix]()
