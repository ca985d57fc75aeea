"""How fast memory moves what line scans read, in their order: results/scan_reads-<gpu>.json.

    python benchmarks/scan_reads.py          half a minute; needs a CUDA GPU

A scan over rows takes one row of the picture after the other, one over columns a piece of every row at a
time. How large the pieces are follows from the layout: the bytes that a position has in a tensor, those of
them that belong to one direction, and how these are shared out to blocks. Nothing is computed here and no
line waits for another, so a scan with the same layout can at best be as fast; `line_scan.py` says what it
reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import copy_bandwidth, time_graph, write_result

SIDE = 1024  # rows and columns of a picture
THREADS = 256
AHEAD = (2, 8)  # lines that are on their way at once
BYTES = 2**30  # to be moved, about


class Layout(NamedTuple):
    """Of a position: bytes in memory, those of one direction, and those that one block takes of them."""

    name: str
    pitch: int
    wanted: int
    piece: int


LAYOUTS = [
    # Of one channel a vector holds several columns: it stands for a position.
    *(Layout("1 channel", piece, piece, piece) for piece in (16, 32, 64, 128)),
    Layout("8 channels, directions apart", 16, 16, 16),
    *(Layout("48 channels", 384, 96, piece) for piece in (32, 96)),
    *(Layout("48 channels, directions apart", 96, 96, piece) for piece in (32, 96)),
    *(Layout("144 channels", 1152, 288, piece) for piece in (32, 96, 288)),
    *(Layout("144 channels, directions apart", 288, 288, piece) for piece in (32, 96, 288)),
    *(Layout("144 channels, rows of the mixer's projection", 2432, 288, piece) for piece in (32, 96, 288)),
]


class Walk(NamedTuple):
    """How the blocks of a launch go through the pictures; strides and sizes in bytes."""

    line: int
    position: int
    lines: int
    positions: int
    vectors: int  # of 16 bytes, that a block takes of a position
    stretch: int  # positions of a block
    slices: int  # of a position, each of another block
    stretches: int  # blocks that share a line
    picture: int


def walk(layout: Layout, over_columns: bool) -> Walk:
    """The walk over pictures of SIDE rows and, of one channel, SIDE columns of two bytes."""
    width = 2 * SIDE // layout.pitch if layout.name == "1 channel" else SIDE
    row = width * layout.pitch
    lines, positions = (width, SIDE) if over_columns else (SIDE, width)
    line, position = (layout.pitch, row) if over_columns else (row, layout.pitch)
    vectors = layout.piece // 16
    stretch = min(positions, THREADS // vectors)
    slices, stretches = layout.wanted // layout.piece, -(-positions // stretch)
    return Walk(line, position, lines, positions, vectors, stretch, slices, stretches, SIDE * row)


def measure(layout: Layout, over_columns: bool, ahead: int) -> dict[str, Any]:
    """Bytes a second, read and written."""
    import cupy

    way = walk(layout, over_columns)
    wanted = way.lines * way.positions * layout.wanted
    pictures = max(1, BYTES // wanted)
    data = torch.zeros(pictures * way.picture, dtype=torch.uint8, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    source = f"#define AHEAD {ahead}\n{Path(__file__).with_suffix('.cu').read_text()}"
    module = cupy.RawModule(code=source, options=("--std=c++17",))
    blocks = pictures * way.slices * way.stretches

    def seconds(name: str, *pointers: int) -> float:
        kernel = module.get_function(name)

        def launch() -> None:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                kernel((blocks,), (THREADS,), (*pointers, *way))

        return time_graph(launch, 10) / 1e3

    moved = pictures * wanted
    return {
        **layout._asdict(),
        "scans": "columns" if over_columns else "rows",
        "ahead": ahead,
        "blocks": blocks,
        "read_bytes_per_second": moved / seconds("read", data.data_ptr(), sink.data_ptr()),
        "written_bytes_per_second": moved / seconds("write", data.data_ptr()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    bandwidth, rows = copy_bandwidth(), []
    for layout in LAYOUTS:
        for over_columns in (False, True):
            for ahead in AHEAD:
                rows.append(measure(layout, over_columns, ahead))
                torch.cuda.empty_cache()
        print(*rows[-2 * len(AHEAD) :], sep="\n", flush=True)
    result = {"copy_bytes_per_second": bandwidth, "rows": rows}
    print(f"wrote {write_result(result, options.out, 'scan_reads', options.commit)}")


if __name__ == "__main__":
    main()
