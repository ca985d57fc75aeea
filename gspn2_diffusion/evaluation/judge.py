"""The judge: one small network that names the concept and the style of a drawn thing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gspn2_diffusion.training.checkpoint import replace_folder


@dataclass(frozen=True)
class JudgeSize:
    """Width of the first stage, features before the heads, side of the input in pixels."""

    width: int = 48
    features: int = 192
    side: int = 96


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        return self.skip(x) + self.conv2(F.relu(self.norm2(self.conv1(y))))


class Judge(nn.Module):
    """Residual network with a head for concepts and one for styles.

    Args:
        concepts: names of the concept classes.
        styles: names of the style classes.
        size: see `JudgeSize`.
    """

    def __init__(self, concepts: Sequence[str], styles: Sequence[str], size: JudgeSize | None = None) -> None:
        super().__init__()
        size = size or JudgeSize()
        self.concepts, self.styles, self.size = tuple(concepts), tuple(styles), size
        widths = [size.width * 2**stage for stage in range(4)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)]
        for inner, outer in zip([widths[0], *widths[:-1]], widths, strict=True):
            layers += [_Residual(inner, outer, 1 if inner == outer else 2), _Residual(outer, outer, 1)]
        self.trunk = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.embed = nn.Linear(2 * widths[-1], size.features)
        self.concept_head = nn.Linear(size.features, len(self.concepts))
        self.style_head = nn.Linear(2 * widths[-1], len(self.styles))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judge crops.

        Args:
            pictures: (B, 3, side, side) in -1..1.

        Returns:
            Concept logits (B, concepts), style logits (B, styles), features (B, features).
        """
        found = self.trunk(pictures)
        # Means say what covers the picture; maxima find an outline or a gloss, which tell styles apart.
        pooled = torch.cat([found.mean(dim=(2, 3)), found.amax(dim=(2, 3))], dim=1)
        features = self.embed(pooled)
        return self.concept_head(F.relu(features)), self.style_head(pooled), features

    def save(self, folder: Path, measures: dict[str, float]) -> None:
        """Write weights and ``judge.json`` with classes and the judge's own accuracy."""
        part = folder.with_name(f".{folder.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, part / _WEIGHTS)
        facts = {
            "concepts": self.concepts,
            "styles": self.styles,
            "size": vars(self.size),
            "measures": measures,
        }
        (part / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        replace_folder(part, folder)


_WEIGHTS, _FACTS = "judge.safetensors", "judge.json"


def load_judge(folder: Path, device: torch.device) -> tuple[Judge, dict[str, float]]:
    """A saved judge in evaluation mode, and its measures.

    Raises:
        FileNotFoundError: the folder holds no judge.
    """
    if not (folder / _FACTS).is_file():
        raise FileNotFoundError(f"{folder} holds no judge ({_FACTS} is missing)")
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    judge = Judge(facts["concepts"], facts["styles"], JudgeSize(**facts["size"]))
    judge.load_state_dict(load_file(folder / _WEIGHTS))
    return judge.to(device).eval(), facts["measures"]


@dataclass
class Verdicts:
    """What the judge says about N crops, on the CPU.

    Attributes:
        concepts: (N, 5) class numbers, most likely first (fewer where there are fewer classes).
        styles: (N,) class numbers.
        features: (N, features) float32.
    """

    concepts: Tensor
    styles: Tensor
    features: Tensor


@torch.no_grad()
def judge_crops(judge: Judge, crops: Tensor, batch: int = 256) -> Verdicts:
    """Judge crops (N, 3, side, side) in 0..1."""
    device = next(judge.parameters()).device
    concepts, styles, features = [], [], []
    for start in range(0, len(crops), batch):
        found = judge(crops[start : start + batch].to(device) * 2 - 1)
        concepts.append(found[0].topk(min(5, len(judge.concepts)), dim=1).indices.cpu())
        styles.append(found[1].argmax(dim=1).cpu())
        features.append(found[2].float().cpu())
    return Verdicts(torch.cat(concepts), torch.cat(styles), torch.cat(features))
