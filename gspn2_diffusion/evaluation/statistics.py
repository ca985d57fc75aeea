"""Shares with confidence intervals, and the Frechet distance between sets of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_Z = 1.959964  # two-sided 95%


@dataclass(frozen=True)
class Share:
    """A share of successes with its 95% Wilson interval."""

    value: float
    low: float
    high: float
    count: int


def share(results: Sequence[bool]) -> Share:
    """Share of True values; an empty sequence gives 0 with the whole range as interval."""
    count = len(results)
    if not count:
        return Share(0.0, 0.0, 1.0, 0)
    rate, square = sum(results) / count, _Z * _Z
    middle = (rate + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(rate * (1 - rate) / count + square / (4 * count * count)) / (1 + square / count)
    return Share(rate, max(0.0, middle - half), min(1.0, middle + half), count)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    Args:
        first: (N, D).
        second: (M, D).

    Raises:
        ValueError: a set holds fewer than two rows, or the widths differ.
    """
    if len(first) < 2 or len(second) < 2 or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"two sets of at least two rows of equal width are needed, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    first, second = first.double(), second.double()
    cov_a, cov_b = torch.cov(first.T), torch.cov(second.T)
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_interval(
    first: Tensor, second: Tensor, rounds: int = 40, seed: int = 0
) -> tuple[float, float, float]:
    """Distance and its 95% interval by resampling the rows of both sets."""
    generator = torch.Generator().manual_seed(seed)

    def again(rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (len(rows),), generator=generator)]

    value = frechet_distance(first, second)
    found = torch.tensor([frechet_distance(again(first), again(second)) for _ in range(rounds)])
    # Resampled sets repeat rows, which biases every round alike; only their spread is used.
    spread = float(found.std()) if rounds > 1 else 0.0
    return value, max(0.0, value - _Z * spread), value + _Z * spread
