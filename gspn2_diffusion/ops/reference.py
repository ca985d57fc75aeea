"""The line scan in plain torch: the ground truth beside the CUDA kernels, and the CPU path.

Imports torch alone and runs on any device, in float64 too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_weights(weight: Tensor) -> Tensor:
    """Raw coefficients to propagation weights that sum to 1 over the neighbours that exist.

    GSPN-2's Stability-Context Condition (section 3): a sigmoid, divided by the sum over the neighbours.
    Written as a softmax of log-sigmoids, which is the same number and cannot divide zero by zero.

    Args:
        weight: ``(..., P, G, 3)`` raw coefficients; positions of a line in dimension -3, neighbours
            ``p-1, p, p+1`` last.

    Returns:
        A tensor of the same shape and dtype; weights of missing neighbours are 0.
    """
    return torch.softmax(F.logsigmoid(weight).masked_fill(_missing(weight), float("-inf")), dim=-1)


def _missing(weight: Tensor) -> Tensor:
    """``(P, 1, 3)`` mask: the first position has no ``p-1``, the last one no ``p+1``."""
    positions = weight.shape[-3]
    mask = torch.zeros(positions, 1, 3, dtype=torch.bool, device=weight.device)
    mask[0, :, 0] = True
    mask[positions - 1, :, 2] = True
    return mask


def _to_lines(tensor: Tensor, direction: str) -> Tensor:
    """``(B, H, W, ...)`` to ``(B, T, P, ...)``: lines in the order in which ``direction`` visits them."""
    lines = tensor.transpose(1, 2) if direction in ("right", "left") else tensor
    return lines.flip(1) if direction in ("up", "left") else lines


def _to_picture(lines: Tensor, direction: str) -> Tensor:
    """Undo :func:`_to_lines`."""
    lines = lines.flip(1) if direction in ("up", "left") else lines
    return lines.transpose(1, 2) if direction in ("right", "left") else lines


def _propagate(source: Tensor, weight: Tensor, chunk_size: int | None) -> Tensor:
    """``h[i] = W[i] h[i-1] + source[i]`` along dimension -4.

    Args:
        source: ``(..., T, P, G, C // G)``, the gated input ``lam * x``.
        weight: ``(..., T, P, G, 3)``, used as given.
        chunk_size: lines after which ``h`` restarts, or None.

    Returns:
        The hidden states ``h``, shaped like ``source``.
    """
    before, here, after = (w.unsqueeze(-1) for w in weight.unbind(-1))
    sources, states = source.unbind(-4), []
    for i, line in enumerate(sources):
        if i == 0 or (chunk_size is not None and i % chunk_size == 0):
            state = line
        else:
            padded = F.pad(state, (0, 0, 0, 0, 1, 1))  # missing neighbours count as zero
            state = (
                line
                + before.select(-4, i) * padded[..., :-2, :, :]
                + here.select(-4, i) * state
                + after.select(-4, i) * padded[..., 2:, :, :]
            )
        states.append(state)
    return torch.stack(states, dim=-4)


def line_scan_reference(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: Sequence[str],
    chunk_size: int | None,
    normalize: bool,
) -> Tensor:
    """:func:`gspn2_diffusion.line_scan` in plain torch; shapes and meaning as there.

    Half precision is computed in float32 and rounded once, as the kernels do.
    """
    height, width = x.shape[1:3]
    groups = weight.shape[4]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    results: list[Tensor | None] = [None] * len(directions)
    for together in _same_line_shape(directions, height, width):
        source = torch.stack(
            [_to_lines(lam[:, :, :, d].to(compute) * x.to(compute), directions[d]) for d in together]
        )
        coefficients = torch.stack(
            [_to_lines(weight[:, :, :, d].to(compute), directions[d]) for d in together]
        )
        if normalize:
            coefficients = normalize_weights(coefficients)
        states = _propagate(source.unflatten(-1, (groups, -1)), coefficients, chunk_size).flatten(-2)
        for d, state in zip(together, states.unbind(0), strict=True):
            results[d] = _to_picture(state, directions[d])
    hidden = torch.stack([r for r in results if r is not None], dim=3)
    return (hidden if u is None else hidden * u.to(compute)).to(x.dtype)


def _same_line_shape(directions: Sequence[str], height: int, width: int) -> list[list[int]]:
    """Indices of the directions that can share one loop, because their lines have the same shape."""
    vertical = [d for d, name in enumerate(directions) if name in ("down", "up")]
    horizontal = [d for d, name in enumerate(directions) if name in ("right", "left")]
    if height == width:
        return [vertical + horizontal]
    return [indices for indices in (vertical, horizontal) if indices]
