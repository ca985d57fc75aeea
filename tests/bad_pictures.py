"""Files that are no pictures, though they begin like one."""

from __future__ import annotations

import struct
import zlib


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and ends where they should be."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT"
