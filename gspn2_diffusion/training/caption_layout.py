"""Caption layers that know, before the denoiser's training, where each thing of a caption shall stand.

A frozen sentence encoder hardly says in the token of a thing on which side of another it stands, and the
denoiser's own loss teaches that only through pictures, over many thousand steps. The captions of composed
scenes come with the truth, so the caption layers learn it from text alone within seconds. What they say is
read off fixed directions of their output, which the cross-attention of every block then finds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gspn2_diffusion.training.optim import set_learning_rate
from gspn2_diffusion.training.schedule import learning_rate_factor
from gspn2_diffusion.training.text import encode_text

if TYPE_CHECKING:
    from gspn2_diffusion.training.captions import PlacedCaption, SceneWriter
    from gspn2_diffusion.training.runtime import Run

_STREAM, _JUDGED_STREAM = 24, 25
_STRENGTH = 6.0  # tokens have unit size in every channel: half the picture away is 3 of those units
_RATE = 1e-3
_WARMUP = 20
_POOL = 131072  # captions that are encoded, once; from fewer the layers learn the captions, not the rule
_ENCODED = 2048  # at a time
_JUDGED = 512
_NEAR = 0.4  # neighbours in a row of two stand 1 apart, of three 2/3


def is_untaught(model: Any) -> bool:
    """Whether a model has caption layers and all of them still do nothing."""
    layers = model.caption_layers
    return len(layers) > 0 and all(not layer.attn.to_out[0].weight.any() for layer in layers)


def teach_layout(run: Run, model: Any, encoder: Any, writer: SceneWriter, *, steps: int, batch: int) -> float:
    """Train the caption layers alone until the tokens of each thing say its place and size.

    Args:
        run: the run; every process does the same.
        model: a ``GSPN2Transformer2DModel`` with caption layers, on the run's device; changed in place.
        encoder: has ``text_encoder`` and ``tokenize``.
        writer: writes scenes.
        steps: of AdamW.
        batch: captions in a step.

    Returns:
        Share of the tokens of things that say the right place, in new captions with several things.
    """
    parameters = list(model.caption_layers.parameters())
    own = set(parameters)
    others = [p for p in model.parameters() if p.requires_grad and p not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    readout = place_directions(model.inner_dim, run.device)
    seed = run.config.seed
    pool = _encoded(encoder, writer.places(min(max(steps, 1) * batch, _POOL), (seed, _STREAM)), run.device)
    generator = torch.Generator(run.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        factor = learning_rate_factor(step / steps, step, _WARMUP, decay_fraction=0.5)
        set_learning_rate(optimizer, _RATE * factor)
        rows = torch.randint(len(pool.known), (batch,), device=run.device, generator=generator)
        part = pool.rows(rows)
        with run.autocast():
            found = part.read(model, readout)
        error = (found - part.places).square().sum(-1) * part.known
        (error.sum() / part.known.sum().clamp(min=1)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for parameter in others:
        parameter.requires_grad_(True)
    return _judge(run, model, encoder, writer, readout)


def place_directions(dim: int, device: torch.device) -> Tensor:
    """The fixed directions (3, dim) along which tokens say x, y and size."""
    random = torch.randn(dim, 3, generator=torch.Generator().manual_seed(_STREAM))
    return (torch.linalg.qr(random).Q.T / _STRENGTH).to(device)


def token_places(captions: Sequence[PlacedCaption], offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The truth for every token: (B, L, 3) x, y, size, and (B, L) whether it belongs to one thing's words.

    ``offsets (B, L, 2)`` say where tokens begin and end. Words that stand more than once in a caption ("cat"
    beside "cat face") are left out.
    """
    places = np.zeros((*offsets.shape[:2], 3), dtype=np.float32)
    known = np.zeros(offsets.shape[:2], dtype=np.float32)
    for row, (item, (first, last)) in enumerate(zip(captions, offsets.mT.numpy(), strict=True)):
        for words, *place in item.things:
            if item.caption.count(words) == 1:
                start = item.caption.index(words)
                inside = (first >= start) & (last <= start + len(words)) & (last > first)
                places[row, inside] = place
                known[row, inside] = 1.0
    return torch.from_numpy(places), torch.from_numpy(known)


@dataclass
class _Pool:
    """Encoded captions with the truth for their tokens, all on the device."""

    hidden: Tensor
    mask: Tensor
    places: Tensor
    known: Tensor

    def rows(self, chosen: Tensor) -> _Pool:
        return _Pool(self.hidden[chosen], self.mask[chosen], self.places[chosen], self.known[chosen])

    def read(self, model: Any, readout: Tensor) -> Tensor:
        """What the caption layers say of every token's place: float32 (B, L, 3), x, y and size."""
        tokens = model.encode_caption(self.hidden.to(model.caption_norm.weight.dtype), self.mask)
        with torch.autocast(readout.device.type, enabled=False):
            return tokens.float() @ readout.T


def _encoded(encoder: Any, captions: list[PlacedCaption], device: torch.device) -> _Pool:
    ids, mask, offsets = encoder.tokenize.with_offsets([item.caption for item in captions])
    places, known = token_places(captions, offsets)
    mask = mask.to(device)
    parts = zip(ids.to(device).split(_ENCODED), mask.split(_ENCODED), strict=True)
    hidden = torch.cat([encode_text(encoder.text_encoder, *part).hidden for part in parts])
    return _Pool(hidden, mask, places.to(device), known.to(device))


@torch.no_grad()
def _judge(run: Run, model: Any, encoder: Any, writer: SceneWriter, readout: Tensor) -> float:
    """Share of the tokens of scenes with several things that say where their thing stands."""
    written = writer.places(_JUDGED, (run.config.seed, _JUDGED_STREAM))
    captions = [item for item in written if len(item.things) > 1]
    if not captions:
        return float("nan")
    pool = _encoded(encoder, captions, run.device)
    with run.autocast():
        found = pool.read(model, readout)
    right = (found - pool.places)[..., :2].abs().amax(dim=-1) < _NEAR
    return float((right * pool.known).sum() / pool.known.sum())
