"""Scenes as latents: composing and encoding on the device, and a ring of them to train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.captions import SceneWriter
from gspn2_diffusion.training.prefetch import Prefetcher
from gspn2_diffusion.training.rings import TensorRing
from gspn2_diffusion.training.scenes import SceneBatch, compose
from gspn2_diffusion.training.text import CaptionTokenizer, TextStates, encode_text


@dataclass
class WrittenScenes:
    """Scene descriptions and their tokenised captions, (B, L) ids and mask."""

    scenes: SceneBatch
    ids: Tensor
    mask: Tensor

    def pin_memory(self) -> WrittenScenes:
        """The same in page-locked memory."""
        return WrittenScenes(self.scenes.pin_memory(), self.ids.pin_memory(), self.mask.pin_memory())


@dataclass
class LatentBatch:
    """Encoded scenes: latents (B, C, h, w) and what their captions say."""

    latents: Tensor
    text: TextStates


class SceneEncoder:
    """Frozen autoencoder and text encoder behind one call.

    Args:
        vae: AutoencoderKL on its device, in the type it shall run in.
        text_encoder: a BertModel or alike, likewise.
        tokenizer: its fast tokenizer.
        resolution: side of the pictures in pixels.
        max_text_tokens: length of the token rows.
        compiled: compile the autoencoder's encoder.
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: nn.Module,
        tokenizer: Any,
        *,
        resolution: int,
        max_text_tokens: int,
        compiled: bool,
    ) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.text_encoder = text_encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.resolution = resolution
        self.tokenize = CaptionTokenizer(tokenizer, max_text_tokens)
        self._encode = _latent_function(self.vae)
        if compiled:
            self._encode = torch.compile(self._encode, dynamic=False)

    def write(self, writer: SceneWriter, count: int, seed: Sequence[int]) -> WrittenScenes:
        """The CPU's part: `count` scenes with tokenised captions."""
        scenes = writer.write(count, seed)
        return WrittenScenes(scenes, *self.tokenize(scenes.captions))

    @torch.no_grad()
    def encode(self, written: WrittenScenes, sprites: Tensor) -> LatentBatch:
        """The device's part; nothing in it waits for the device."""
        device = sprites.device
        pixels = compose(sprites, written.scenes.to(device), self.resolution)
        latents = self._encode(pixels)
        ids, mask = (x.to(device, non_blocking=True) for x in (written.ids, written.mask))
        return LatentBatch(latents, encode_text(self.text_encoder, ids, mask))

    @torch.no_grad()
    def empty(self, device: torch.device) -> TextStates:
        """The encoded empty caption, batch of one."""
        ids, mask = self.tokenize([""])
        return encode_text(self.text_encoder, ids.to(device), mask.to(device))


def _latent_function(vae: Any) -> Callable[[Tensor], Tensor]:
    """Pictures (B, 3, H, W) to the posterior's mode, normalised, (B, C, h, w) float32.

    Settings are read here: looking them up inside would break the compiled graph.
    """
    dtype, shift, scale = vae.dtype, float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)
    encoder, quant = vae.encoder, vae.quant_conv

    def latents(pixels: Tensor) -> Tensor:
        moments = encoder(pixels.to(dtype).contiguous(memory_format=torch.channels_last))
        if quant is not None:
            moments = quant(moments)
        return (moments.chunk(2, dim=1)[0].float() - shift) * scale

    return latents


class LatentBank:
    """Ring of encoded scenes in device memory.

    Args:
        capacity: entries.
        sample: gives shapes and the device.
    """

    def __init__(self, capacity: int, sample: LatentBatch) -> None:
        # float16 has finer steps than bfloat16, and normalised latents lie far inside its range
        latents = torch.float16 if sample.latents.is_cuda else torch.float32
        text = sample.text.hidden.dtype  # which the model takes as it is, where there is no autocast
        kinds = {"latents": latents, "hidden": text, "mask": torch.bool, "pooled": text}
        self._ring = TensorRing(capacity, _columns(sample), kinds)

    @property
    def filled(self) -> int:
        """Entries written so far, at most the capacity."""
        return self._ring.filled

    def write(self, start: int, batch: LatentBatch) -> None:
        """Replace the entries from `start` on, modulo the capacity, which the batch must divide."""
        self._ring.write(start, _columns(batch))

    def draw(self, count: int, generator: torch.Generator) -> LatentBatch:
        """`count` random entries, with repetition; latents as float32."""
        picked = self._ring.draw(count, generator)
        text = TextStates(picked["hidden"], picked["mask"], picked["pooled"])
        return LatentBatch(picked["latents"].float(), text)


def _columns(batch: LatentBatch) -> dict[str, Tensor]:
    text = batch.text
    return {"latents": batch.latents, "hidden": text.hidden, "mask": text.mask, "pooled": text.pooled}


class LatentFeed:
    """Keeps a bank fresh: `refresh` new scenes a step, captions written ahead in a thread.

    Everything follows from (seed, rank, number of the chunk), and the state of the bank from the step alone,
    so a resumed run rebuilds the very bank that the interrupted one had.

    Args:
        encoder: makes latents.
        writer: makes scene descriptions.
        sprites: uint8 (S, 4, side, side) on the device.
        seed: (seed, rank).
        step: step that is trained next.
        capacity: entries wanted in the bank, rounded up to whole chunks.
        refresh: scenes in a chunk.
        initial: entries needed before the first step.
        depth: chunks written ahead.
    """

    def __init__(
        self,
        encoder: SceneEncoder,
        writer: SceneWriter,
        sprites: Tensor,
        *,
        seed: Sequence[int],
        step: int,
        capacity: int,
        refresh: int,
        initial: int,
        depth: int,
    ) -> None:
        self._encoder, self._sprites, self._refresh = encoder, sprites, refresh
        chunks = max(1, math.ceil(capacity / refresh))
        ahead = max(1, min(chunks, math.ceil(initial / refresh)))
        pin = sprites.is_cuda

        def make(number: int) -> WrittenScenes:
            written = encoder.write(writer, refresh, (*seed, number))
            if not pin:
                return written
            torch.cuda.set_device(sprites.device)  # a new thread starts on the first GPU
            return written.pin_memory()

        self._chunk = max(0, step + ahead - chunks)
        self._prefetcher = Prefetcher(make, self._chunk, depth)
        self._bank: LatentBank | None = None
        self._size = chunks * refresh
        # The step itself adds one chunk before it draws.
        while self._chunk < step + ahead - 1:
            self.advance()

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for captions."""
        return self._prefetcher.wait_seconds

    def advance(self) -> None:
        """Encode the next chunk into the bank."""
        batch = self._encoder.encode(self._prefetcher.get(), self._sprites)
        if self._bank is None:
            self._bank = LatentBank(self._size, batch)
        self._bank.write(self._chunk * self._refresh, batch)
        self._chunk += 1

    def draw(self, count: int, generator: torch.Generator) -> LatentBatch:
        """`count` random entries of the bank."""
        if self._bank is None:
            raise RuntimeError("`advance` must run before `draw`")
        return self._bank.draw(count, generator)

    def close(self) -> None:
        """End the thread."""
        self._prefetcher.close()
