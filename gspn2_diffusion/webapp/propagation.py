"""How far one point of a picture reaches in one scan: measured on the model itself.

With its weights, ``lam`` and ``u`` fixed by the picture, a line scan is linear in what it carries (GSPN-2,
section 3): ``y(p) = u(p) * sum over q of K(p, q) lam(q) x(q)``. What one point sends is therefore the scan of
an ``x`` that is zero everywhere else, run through the same operator with the weights that the layer had at
that step. Reported is the length of the vector that arrives at each token, after the output projection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

ALL = "all"


@dataclass
class Recorder:
    """What the mixers of a denoiser got to see: the scan's input of every layer at every denoiser call.

    Attributes:
        calls: how often the denoiser has been called.
        only: the only call (from 0) to keep, None for all of them.
        proxies: per call, then per layer, ``(H*W, P)`` on the CPU; of a guided call the half with the prompt.
        grid: tokens of the height and of the width.
    """

    only: int | None = None
    proxies: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)
    grid: tuple[int, int] = (0, 0)
    calls: int = 0

    @contextlib.contextmanager
    def watch(self, transformer: Any) -> Iterator[None]:
        """Records every call of ``transformer`` within the block."""
        handles = [transformer.register_forward_pre_hook(self._begin)]
        for index, mixer in scan_layers(transformer).items():
            handles.append(mixer.register_forward_pre_hook(self._note_grid))
            handles.append(mixer.to_proxy.register_forward_hook(self._keeper(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _module: Any, _inputs: Any) -> None:
        self.calls += 1

    def _note_grid(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.grid = int(inputs[1]), int(inputs[2])

    def _keeper(self, index: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            call = self.calls - 1
            if self.only in (None, call):
                self.proxies.setdefault(call, {})[index] = output[-1].detach().to("cpu", copy=True)

        return keep


def scan_layers(transformer: Any) -> dict[int, Any]:
    """The mixers that scan, by the number of their layer from 0."""
    from gspn2_diffusion.layers.mixer import GSPN2Mixer

    blocks = enumerate(transformer.transformer_blocks)
    return {index: block.mixer for index, block in blocks if isinstance(block.mixer, GSPN2Mixer)}


@dataclass(frozen=True)
class Influence:
    """What a point sends.

    Attributes:
        maps: by direction, and "all" for their sum: ``(H, W)`` float32, length of the vector that arrives.
        point: row and column of the token.
    """

    maps: dict[str, np.ndarray]
    point: tuple[int, int]

    def reach(self, direction: str = ALL) -> float:
        """Mean distance in tokens that the influence travels, the point's own share left out."""
        import numpy as np

        weights = self.maps[direction].astype(np.float64).copy()
        weights[self.point] = 0.0
        rows, columns = np.indices(weights.shape)
        distance = np.hypot(rows - self.point[0], columns - self.point[1])
        return float((weights * distance).sum() / weights.sum()) if weights.sum() > 0 else 0.0


def influence(mixer: Any, proxy: torch.Tensor, grid: tuple[int, int], point: tuple[int, int]) -> Influence:
    """What the token at ``point`` (row, column) sends to all others in one layer.

    Args:
        mixer: the layer's :class:`GSPN2Mixer`, with its adapters as when ``proxy`` was recorded.
        proxy: ``(H*W, P)``, the scan's input, as recorded.
        grid: H and W.
    """
    import torch

    from gspn2_diffusion.ops.line_scan import line_scan

    weights = next(mixer.parameters())
    with torch.no_grad():
        tokens = proxy.to(weights.device)[None]  # (1, H*W, P)
        lam, u, weight = mixer._split_scan(mixer.to_scan(tokens), *grid)
        impulse = torch.zeros_like(tokens.unflatten(1, grid))  # (1, H, W, P)
        impulse[:, point[0], point[1]] = tokens.unflatten(1, grid)[:, point[0], point[1]]
        arrived = line_scan(
            impulse,
            weight,
            lam,
            u,
            directions=mixer.directions,
            chunk_size=mixer.chunk_size,
            backend=mixer.backend,
        )  # (1, H, W, D, P)
        nothing = mixer.to_out(torch.zeros_like(arrived).flatten(3))  # its bias
        maps = {ALL: _length(mixer.to_out(arrived.flatten(3)) - nothing)}
        for index, direction in enumerate(mixer.directions):
            single = torch.zeros_like(arrived)
            single[:, :, :, index] = arrived[:, :, :, index]
            maps[direction] = _length(mixer.to_out(single.flatten(3)) - nothing)
    return Influence(maps, point)


def _length(vectors: torch.Tensor) -> np.ndarray:
    return vectors[0].float().norm(dim=-1).cpu().numpy()


# Black, purple, red, orange, pale yellow: dark to light, also for those who see few colours.
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def display_size(size: tuple[int, int], side: int = 640) -> tuple[int, int]:
    """Width and height of a picture of ``size`` enlarged to about ``side`` pixels."""
    scale = max(1, side // max(size))
    return size[0] * scale, size[1] * scale


def overlay(picture: Image, shown: np.ndarray, point: tuple[int, int]) -> Image:
    """The map over the picture, of :func:`display_size`; the point has a ring.

    Brightness is the square root of the map over its maximum, so that weak influence can be seen.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    size = display_size(picture.size)
    share = np.sqrt(shown / max(float(shown.max()), 1e-12))
    smooth = Image.fromarray((share * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    level = np.asarray(smooth, dtype=np.float32) / 255
    stops = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(level, stops, [c[i] for c in _COLOURS]) for i in range(3)], axis=-1)
    below = np.asarray(picture.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)[..., None]
    opacity = (0.25 + 0.6 * level)[..., None]
    mixed = Image.fromarray(((1 - opacity) * below + opacity * colours).clip(0, 255).astype(np.uint8))
    row, column = ((p + 0.5) * s / n for p, s, n in zip(point, size[::-1], shown.shape, strict=True))
    radius = max(4, max(size) // 60)
    box = (column - radius, row - radius, column + radius, row + radius)
    ImageDraw.Draw(mixed).ellipse(box, outline="#38e0ff", width=max(2, radius // 4))
    return mixed
