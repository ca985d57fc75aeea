"""Training and measuring the judge on real pictures."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_diffusion.evaluation.judge import Judge, JudgeSize
from gspn2_diffusion.training.captions import BACKGROUNDS
from gspn2_diffusion.training.emoji import DEFAULT_GROUPS, STYLES, EmojiRecord, load_sprites, select
from gspn2_diffusion.training.emoji_curation import curated, is_lettered
from gspn2_diffusion.training.scene_colours import OBJECT_COLOURS, TINT_WIDTH, main_colours, tint
from gspn2_diffusion.training.scenes import Layer, SceneBatch, compose

_HELD_CONCEPT_SHARE = 4  # one in so many pictures of unseen concepts is kept from the judge
_RECOLOURED = 0.25


@dataclass(frozen=True)
class JudgeTraining:
    """How the judge is trained; the rate falls to zero at the earlier of the two limits."""

    steps: int = 2000
    seconds: float = 50.0
    batch: int = 384
    rate: float = 2e-3
    weight_decay: float = 0.05
    style_weight: float = 0.5
    smoothing: float = 0.05
    seed: int = 0


@dataclass
class JudgeData:
    """Pictures that the judge learns from and pictures kept from it.

    Attributes:
        train: the training split, and most pictures of the concepts that generators never see.
        held_pairs: (concept, style) pairs kept from judge and generators alike.
        held_concepts: the other pictures of concepts that generators never see.
    """

    train: list[EmojiRecord]
    held_pairs: list[EmojiRecord]
    held_concepts: list[EmojiRecord]


def judge_data(records: Sequence[EmojiRecord]) -> JudgeData:
    """Split the records for the judge, by hash.

    Without pictures of the unseen concepts the judge could not name them in generated pictures. It alone
    sees them; generators never do.
    """
    train, pairs, concepts = (
        curated(select(records, split, DEFAULT_GROUPS))
        for split in ("train", "unseen_pair", "unseen_concept")
    )
    held = [record for record in concepts if _is_held(record)]
    return JudgeData(train + [record for record in concepts if not _is_held(record)], pairs, held)


def _is_held(record: EmojiRecord) -> bool:
    digest = hashlib.sha256(f"judge:{record.concept}:{record.style}".encode()).digest()
    return digest[0] % _HELD_CONCEPT_SHARE == 0


class _Pictures:
    """Endless augmented crops of records, made on the device."""

    def __init__(
        self, records: Sequence[EmojiRecord], device: torch.device, side: int, cache_dir: str | None
    ) -> None:
        sprites = load_sprites(records, size=side * 4 // 3, cache_dir=cache_dir, errors="blank")
        self.sprites, self.device, self.side = sprites.to(device), device, side
        colours = main_colours(self.sprites)
        self._tints = np.zeros((len(records), len(OBJECT_COLOURS), TINT_WIDTH), dtype=np.float32)
        self._tintable = np.array([main.kind != 0 for main in colours])
        for row, main in enumerate(colours):
            if main.kind:
                self._tints[row] = [tint(main, colour) for colour in OBJECT_COLOURS]
        self._mirrored = np.array([not is_lettered(record) for record in records])

    def draw(self, index: np.ndarray, rng: np.random.Generator, strength: float) -> Tensor:
        """(N, 3, side, side) in -1..1; `strength` 0 is the plain picture on a plain background."""
        count = len(index)
        named = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255
        ground = named[rng.integers(len(named), size=count)]
        ground = np.clip(ground + strength * rng.uniform(-0.08, 0.08, (count, 3)), 0, 1).astype(np.float32)
        size = 0.86 + strength * rng.uniform(-0.14, 0.1, count)
        centre = strength * rng.uniform(-0.1, 0.1, (count, 2))
        wide, high = (1 + strength * rng.uniform(-0.12, 0.12, count) for _ in range(2))
        flip = (rng.random(count) < 0.4 * strength) & self._mirrored[index]
        pose = np.stack([strength * rng.uniform(-0.25, 0.25, count), np.where(flip, -wide, wide), high], 1)
        chosen = (rng.random(count) < _RECOLOURED * strength) & self._tintable[index]
        tints = self._tints[index[chosen], rng.integers(len(OBJECT_COLOURS), size=int(chosen.sum()))]
        layer = Layer(
            0,
            torch.from_numpy(index),
            torch.from_numpy(centre.astype(np.float32)),
            torch.from_numpy(size.astype(np.float32)),
            1.0,
            pose=torch.from_numpy(pose.astype(np.float32)),
            tinted=torch.from_numpy(np.flatnonzero(chosen)) if chosen.any() else None,
            tints=torch.from_numpy(tints) if chosen.any() else None,
        )
        scenes = SceneBatch(torch.from_numpy(ground)[:, :, None, None], [layer])
        pictures = compose(self.sprites, scenes.to(self.device), self.side)
        return _worn(pictures, rng) if strength else pictures


def _worn(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Softer, noisier, differently lit, a patch missing: what generated pictures suffer from."""
    side = pictures.shape[-1]
    small = int(side / rng.uniform(1.0, 1.8))
    if small < side:
        pictures = F.interpolate(pictures, size=(small, small), mode="bilinear", antialias=True)
        pictures = F.interpolate(pictures, size=(side, side), mode="bilinear")
    count, device = len(pictures), pictures.device
    light = torch.from_numpy(rng.uniform(0.9, 1.1, (2, count, 3, 1, 1)).astype(np.float32)).to(device)
    pictures = pictures * light[0] + (light[1] - 1)
    pictures = pictures + 0.04 * float(rng.random()) * torch.randn_like(pictures)
    hole = max(1, side // 5)
    top, left = (int(value) for value in rng.integers(0, side - hole, 2))
    covered = count // 4
    pictures[:covered, :, top : top + hole, left : left + hole] = pictures[:covered, :, :1, :1]
    return pictures.clamp(-1, 1)


def train_judge(
    data: JudgeData,
    device: torch.device,
    *,
    size: JudgeSize | None = None,
    training: JudgeTraining | None = None,
    cache_dir: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Judge, dict[str, float]]:
    """Train a judge and measure it on real pictures that it has not seen.

    Args:
        data: see `judge_data`.
        device: where it trains.
        size: of the network.
        training: limits and rates.
        cache_dir: folder for the drawn sprites.
        say: gets a line now and then.

    Returns:
        The judge in evaluation mode, and its measures: accuracies on held-out real pictures.
    """
    training = training or JudgeTraining()
    torch.manual_seed(training.seed)
    concepts = sorted({record.concept for record in data.train})
    judge = Judge(concepts, STYLES, size).to(device)
    if device.type == "cuda":
        judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labels = _labels(judge, data.train, device)
    pictures = _Pictures(data.train, device, judge.size.side, cache_dir)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=training.rate, weight_decay=training.weight_decay)
    rng = np.random.default_rng(training.seed)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1.0:
        warm = min(1.0, (step + 1) / (0.05 * training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.rate * warm * max(0.0, 1.0 - progress)
        index = rng.integers(len(data.train), size=training.batch)
        loss = _loss(judge, pictures.draw(index, rng, 1.0), labels, torch.from_numpy(index), training)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress = max(step / training.steps, (time.monotonic() - started) / training.seconds)
        if step % 250 == 0:
            say(f"judge: step {step}, loss {float(loss):.3f}")
    judge.eval()
    measures = {"judge_steps": float(step), "judge_seconds": round(time.monotonic() - started, 1)}
    for name, held in (("unseen_pairs", data.held_pairs), ("unseen_concepts", data.held_concepts)):
        measures |= _accuracy(judge, held, name, device, cache_dir)
    say("judge: " + ", ".join(f"{key} {value:.3g}" for key, value in measures.items()))
    return judge, measures


def _loss(
    judge: Judge, pictures: Tensor, labels: tuple[Tensor, Tensor], index: Tensor, training: JudgeTraining
) -> Tensor:
    index = index.to(pictures.device)
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16, enabled=pictures.is_cuda):
        concept, style, _ = judge(pictures)
    smooth = training.smoothing
    named = F.cross_entropy(concept.float(), labels[0][index], label_smoothing=smooth)
    return named + training.style_weight * F.cross_entropy(
        style.float(), labels[1][index], label_smoothing=smooth
    )


def _labels(judge: Judge, records: Sequence[EmojiRecord], device: torch.device) -> tuple[Tensor, Tensor]:
    concept = {name: number for number, name in enumerate(judge.concepts)}
    style = {name: number for number, name in enumerate(judge.styles)}
    return (
        torch.tensor([concept.get(record.concept, -1) for record in records], device=device),
        torch.tensor([style[record.style] for record in records], device=device),
    )


@torch.no_grad()
def _accuracy(
    judge: Judge, records: Sequence[EmojiRecord], name: str, device: torch.device, cache_dir: str | None
) -> dict[str, float]:
    """Accuracies on real pictures that were kept from the judge, each on one background."""
    known = [record for record in records if record.concept in set(judge.concepts)]
    if not known:
        return {}
    labels = _labels(judge, known, device)
    pictures = _Pictures(known, device, judge.size.side, cache_dir)
    drawn = pictures.draw(np.arange(len(known)), np.random.default_rng(1), 0.0)
    found = [judge(part) for part in drawn.split(256)]
    concept, style = (torch.cat([part[i] for part in found]) for i in (0, 1))
    best = concept.topk(min(5, concept.shape[1]), dim=1).indices == labels[0][:, None]
    return {
        f"{name}_pictures": float(len(known)),
        f"{name}_top1": float(best[:, 0].float().mean()),
        f"{name}_top5": float(best.any(dim=1).float().mean()),
        f"{name}_style": float((style.argmax(dim=1) == labels[1]).float().mean()),
    }
