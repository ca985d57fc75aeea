"""FID and CLIP score by torchmetrics, for users who have the networks' weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class MissingMetricError(RuntimeError):
    """torchmetrics or a network that it needs is not there; the message says which."""


def _as_bytes(pictures: Sequence[Tensor]) -> Tensor:
    return torch.stack([(picture * 255).round().to(torch.uint8) for picture in pictures])


def fid(real: Sequence[Tensor], drawn: Sequence[Tensor], weights: str | None, device: torch.device) -> float:
    """Frechet Inception Distance of two sets of pictures (3, H, W) in 0..1.

    Args:
        real: real pictures.
        drawn: generated ones.
        weights: file of the Inception weights, or None to let torch-fidelity fetch them.
        device: where the network runs.

    Raises:
        MissingMetricError: torchmetrics, torch-fidelity or the weights are missing.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        options: dict[str, Any] = {"feature_extractor_weights_path": weights} if weights else {}
        metric = FrechetInceptionDistance(feature=2048, **options).to(device)
    except Exception as error:
        raise MissingMetricError(
            f"FID needs torchmetrics with torch-fidelity and Inception weights: {error}"
        ) from error
    for pictures, is_real in ((real, True), (drawn, False)):
        for part in _as_bytes(pictures).split(64):
            metric.update(part.to(device), real=is_real)
    return float(metric.compute())


def clip_score(pictures: Sequence[Tensor], prompts: Sequence[str], model: str, device: torch.device) -> float:
    """Mean CLIP score of pictures (3, H, W) in 0..1 and their prompts.

    Args:
        pictures: generated pictures.
        prompts: their prompts.
        model: folder or Hub name of a CLIP model.
        device: where the network runs.

    Raises:
        MissingMetricError: torchmetrics or the model is missing.
    """
    try:
        from torchmetrics.multimodal.clip_score import CLIPScore

        # torchmetrics types the names of the Hub models; folders work as well
        name: Any = str(Path(model)) if Path(model).is_dir() else model
        metric = CLIPScore(model_name_or_path=name).to(device)
    except Exception as error:
        raise MissingMetricError(f"CLIP score needs torchmetrics and a CLIP model: {error}") from error
    for start in range(0, len(pictures), 32):
        part = _as_bytes(pictures[start : start + 32]).to(device)
        metric.update(part, list(prompts[start : start + 32]))
    return float(metric.compute())
