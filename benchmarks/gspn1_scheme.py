"""GSPN-1's scheme for one picture tensor and all four directions, to compare with; see gspn1_scheme.cu."""

from __future__ import annotations

from pathlib import Path

import cupy
import torch

from gspn2_diffusion.ops.reference import normalize_weights

_THREADS = 512


class GSPN1Scheme:
    """``H`` + ``W`` launches for two directions, each one line of every picture and channel.

    Args:
        x: ``(B, H, W, C)`` bfloat16, and ``weight (B, H, W, 4, 1, 3)`` raw, ``lam`` and ``u``
            ``(B, H, W, 4, C)`` as for ``line_scan``. They are brought into GSPN-1's layout once, outside of
            what is timed: ``(B, C, H, W)`` for each direction, weights normalised and repeated per channel.
    """

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, lam: torch.Tensor, u: torch.Tensor) -> None:
        module = cupy.RawModule(code=Path(__file__).with_suffix(".cu").read_text(), options=("--std=c++17",))
        self.forward_line = module.get_function("forward_line")
        self.backward_line = module.get_function("backward_line")
        batch, self.height, self.width, channels = x.shape
        self.images = batch * channels

        def planes(t: torch.Tensor) -> torch.Tensor:
            return t.permute(0, 3, 1, 2).contiguous()

        self.x = planes(x)
        self.lam = [planes(lam[:, :, :, d]) for d in range(4)]
        self.u = [planes(u[:, :, :, d]) for d in range(4)]
        self.w = []
        for d in range(4):
            raw = weight[:, :, :, d].float()  # (B, H, W, 1, 3), positions in dimension -3 for rows
            raw = normalize_weights(raw) if d < 2 else normalize_weights(raw.transpose(1, 2)).transpose(1, 2)
            self.w.append([planes(raw[..., k].to(x.dtype).expand(x.shape)) for k in range(3)])
        self.h = [torch.empty_like(self.x) for _ in range(4)]
        self.y = [torch.empty_like(self.x) for _ in range(4)]
        self.scratch: list[torch.Tensor] = []

    def _lines(self, direction: int) -> list[list[int]]:
        """Of every launch its ``struct Line``, in the order in which the direction visits the lines."""
        vertical = direction < 2
        count, positions = (self.height, self.width) if vertical else (self.width, self.height)
        pitch, step = (self.width, 1) if vertical else (1, self.width)
        order = range(count) if direction % 2 == 0 else range(count - 1, -1, -1)
        offsets = [line * pitch for line in order]
        area = self.height * self.width
        return [
            [self.images, positions, area, here, before, step]
            for here, before in zip(offsets, [-1, *offsets[:-1]], strict=True)
        ]

    def _launch(self, kernel: object, tensors: list[torch.Tensor], line: list[int], *more: int) -> None:
        blocks = -(-line[0] * line[1] // _THREADS)
        pointers = [t.data_ptr() for t in tensors]
        kernel((blocks,), (_THREADS,), (*pointers, *line, *more))  # type: ignore[operator]

    def _stream(self) -> cupy.cuda.ExternalStream:
        return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def forward(self) -> None:
        with self._stream():
            for d in range(4):
                tensors = [self.x, self.lam[d], *self.w[d], self.u[d], self.h[d], self.y[d]]
                for line in self._lines(d):
                    self._launch(self.forward_line, tensors, line)

    def backward(self) -> None:
        """Gradients of everything for ``dy = y``; the outputs are overwritten by the next direction."""
        if not self.scratch:
            self.scratch = [torch.empty_like(self.x) for _ in range(7)]
        with self._stream():
            for d in range(4):
                tensors = [self.y[d], self.x, self.lam[d], *self.w[d], self.u[d], self.h[d], *self.scratch]
                lines = self._lines(d)
                offsets = [line[3] for line in lines]
                for i in range(len(lines) - 1, -1, -1):
                    line = [*lines[i]]
                    line[4] = offsets[i + 1] if i + 1 < len(lines) else -1
                    self._launch(self.backward_line, tensors, line, offsets[i - 1] if i else -1)
