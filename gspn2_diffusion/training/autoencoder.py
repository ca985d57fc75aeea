"""Training of the picture autoencoder on composed scenes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from gspn2_diffusion.training import losses
from gspn2_diffusion.training.captions import SceneOptions, SceneWriter
from gspn2_diffusion.training.checkpoint import replace_folder
from gspn2_diffusion.training.config import AutoencoderConfig, read_mapping
from gspn2_diffusion.training.data import split_records, sprites_for
from gspn2_diffusion.training.growth import grow_autoencoder
from gspn2_diffusion.training.loop import TrainState, fit, prepare_state
from gspn2_diffusion.training.prefetch import Prefetcher
from gspn2_diffusion.training.runtime import Run, parameter_count
from gspn2_diffusion.training.scene_clutter import clutter
from gspn2_diffusion.training.scenes import SceneBatch, compose
from gspn2_diffusion.training.sheets import contact_sheet, save_picture, to_pictures

_SCENE_STREAM, _NOISE_STREAM, _HELD_OUT_STREAM, _STATISTICS_STREAM = 11, 12, 13, 14
_EVALUATION_BATCH = 32


class Reconstruction(nn.Module):
    """Encode, sample, decode in one call, so that wrappers and the compiler see the whole step.

    Args:
        vae: the trained autoencoder.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct pictures.

        Args:
            pixels: (B, 3, H, W) in -1..1.
            noise: (B, latent_channels, H/f, W/f), added as the posterior says.

        Returns:
            Pictures (B, 3, H, W), posterior mean and log-variance (B, latent_channels, H/f, W/f).
        """
        mean, logvar = posterior(self.vae, pixels)
        return decode(self.vae, mean + torch.exp(0.5 * logvar) * noise), mean, logvar


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents, float32."""
    moments = vae.encoder(pixels)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures from latents that are not normalised."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    return vae.decoder(latents)


class AutoencoderTask:
    """Losses and measures of autoencoder training; see `gspn2_diffusion.training.loop.Task`."""

    def __init__(
        self,
        run: Run,
        config: AutoencoderConfig,
        sprites: Tensor,
        state: TrainState,
        anchor: tuple[Any, int] | None = None,
    ) -> None:
        self._anchor: Any = anchor[0] if anchor is not None else None
        self._anchor_channels = anchor[1] if anchor is not None else 0
        self.run, self.config, self.state, self._sprites = run, config, state, sprites
        vae = state.module.vae
        self._latent = (vae.config.latent_channels, *_latent_size(vae, config.resolution))
        self._judge: Any = None
        self._held_out = self._held_out_scenes() if run.is_main else None
        self._compose_loss = torch.compile(self._loss, dynamic=False) if run.compiles else self._loss
        first = state.step * config.gradient_accumulation_steps
        self._prefetcher = Prefetcher(self._scenes, first, depth=8)

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for scene descriptions."""
        return self._prefetcher.wait_seconds

    def close(self) -> None:
        """End the thread."""
        self._prefetcher.close()

    def _scenes(self, number: int) -> SceneBatch:
        config = self.config
        seed = (config.seed, self.run.rank, _SCENE_STREAM, number)
        scenes = clutter(config.batch_size, len(self._sprites), config.objects, seed)
        if not self._sprites.is_cuda:
            return scenes
        torch.cuda.set_device(self._sprites.device)  # a new thread starts on the first GPU
        return scenes.pin_memory()

    def loss(self, model: nn.Module, step: int, micro: int) -> Tensor:
        """Reconstruction and posterior losses of fresh scenes."""
        pixels = self._draw(self._prefetcher.get())
        generator = self.run.generator(_NOISE_STREAM, step * self.config.gradient_accumulation_steps + micro)
        noise = torch.randn((len(pixels), *self._latent), device=pixels.device, generator=generator)
        found, mean, logvar = model(pixels, noise)
        with torch.autocast(pixels.device.type, enabled=False):
            total = self._compose_loss(found, pixels, mean, logvar)
        return total if self._anchor is None else total + self._drift(pixels, mean)

    def _drift(self, pixels: Tensor, mean: Tensor) -> Tensor:
        """How far the latents have moved from those of the start, on a quarter of the pictures."""
        part = max(1, len(pixels) // 4)
        with torch.no_grad():
            wanted, _ = posterior(self._anchor, pixels[:part])
        known = self._anchor_channels
        with torch.autocast(pixels.device.type, enabled=False):
            moved = (mean[:part, :known] - wanted[:, :known]).pow(2).mean()
            if known < mean.shape[1]:
                moved = moved + losses.moment_loss(mean[:, known:])
        return self.config.anchor_weight * moved

    def _draw(self, scenes: SceneBatch) -> Tensor:
        device = self._sprites.device
        pixels = compose(self._sprites, scenes.to(device), self.config.resolution)
        return pixels.contiguous(memory_format=torch.channels_last)

    def _loss(self, found: Tensor, pixels: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        config = self.config
        found = found.float()
        error = found - pixels
        total = config.l1_weight * error.abs().mean() + config.l2_weight * error.pow(2).mean()
        total = total + config.kl_weight * losses.kl_loss(mean, logvar)
        if config.psnr_weight:
            total = total + config.psnr_weight * losses.log_error_loss(found, pixels)
        if config.edge_weight:
            total = total + config.edge_weight * losses.edge_loss(found, pixels)
        if config.ssim_weight:
            total = total + config.ssim_weight * losses.ssim_loss(found, pixels)
        return total

    def _held_out_scenes(self) -> tuple[Tensor, dict[str, list[SceneBatch]]]:
        """Sprites of unseen concepts and fixed scenes of them, for measuring only.

        "psnr" are cluttered scenes like those of training (blended backgrounds, things cut off), and
        "psnr_scenes" scenes like those that denoisers are trained on.
        """
        from gspn2_diffusion.training.emoji import load_sprites

        records = split_records(self.config, "unseen_concept", ("all",))
        sprites = load_sprites(
            records, size=self.config.sprite_size, cache_dir=self.config.sprite_cache, errors="blank"
        )
        batches = range(-(-self.config.validation_scenes // _EVALUATION_BATCH))
        writer = SceneWriter(records, SceneOptions(0.3, triple_probability=0.1), ("unseen_concept",))
        cluttered = [
            clutter(_EVALUATION_BATCH, len(records), self.config.objects, (_HELD_OUT_STREAM, number))
            for number in batches
        ]
        plain = [writer.write(_EVALUATION_BATCH, (_HELD_OUT_STREAM, number)) for number in batches]
        device = self.run.device
        found = {"psnr": [s.to(device) for s in cluttered], "psnr_scenes": [s.to(device) for s in plain]}
        return sprites.to(device), found

    def judge(self) -> Any:
        """A copy with the averaged weights, as it will be shipped."""
        if self._judge is None:
            made = AutoencoderKL.from_config(self.state.module.vae.config)
            self._judge = made.to(self.run.device, self.run.half).eval().requires_grad_(False)
        self.state.copy_average_to(self._judge)
        return self._judge

    def _pairs(self, kind: str, limit: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Held-out pictures and their reconstructions."""
        if self._held_out is None:
            raise RuntimeError("held-out scenes exist on the main process alone")
        sprites, batches = self._held_out
        vae, pairs = self.judge(), []
        with torch.no_grad():
            for scenes in batches[kind][:limit]:
                pixels = compose(sprites, scenes, self.config.resolution)
                mean, _ = posterior(vae, pixels.to(vae.dtype))
                pairs.append((pixels, decode(vae, mean.to(vae.dtype)).float()))
        return pairs

    def validate(self, step: int) -> dict[str, float]:
        """PSNR in dB on held-out scenes of both kinds, mean over pictures."""
        measures = {}
        for kind in ("psnr", "psnr_scenes"):
            values = torch.cat([losses.psnr(found, wanted) for wanted, found in self._pairs(kind)])
            measures[kind] = float(values[: self.config.validation_scenes].mean())
        return measures

    def sample(self, step: int) -> None:
        """Pictures above their reconstructions."""
        wanted, found = self._pairs("psnr", limit=1)[0]
        ratio = losses.psnr(found, wanted)
        count = min(16, len(wanted))
        rows = [
            p
            for s in range(0, count, 8)
            for p in to_pictures(torch.cat([wanted[s : s + 8], found[s : s + 8]]))
        ]
        words = [
            w for s in range(0, count, 8) for w in [""] * 8 + [f"{float(v):.1f} dB" for v in ratio[s : s + 8]]
        ]
        save_picture(
            contact_sheet(rows, words[: len(rows)], columns=8),
            self.run.output / "sheets" / f"step-{step:07d}.png",
        )

    @torch.no_grad()
    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the latents of training scenes."""
        vae, total, square, count = self.judge(), 0.0, 0.0, 0
        for number in range(-(-self.config.statistics_scenes // _EVALUATION_BATCH)):
            seed = (_STATISTICS_STREAM, number)
            scenes = clutter(_EVALUATION_BATCH, len(self._sprites), self.config.objects, seed, single=0.85)
            mean, _ = posterior(vae, self._draw(scenes).to(vae.dtype))
            total, square = total + float(mean.double().sum()), square + float(mean.double().pow(2).sum())
            count += mean.numel()
        centre = total / count
        return centre, max(1e-12, square / count - centre * centre) ** 0.5


def _latent_size(vae: Any, resolution: int) -> tuple[int, int]:
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return side, side


def load_autoencoder(config: AutoencoderConfig) -> tuple[Any, int]:
    """A new autoencoder of the configuration, the one to start from grown to it, and its known channels."""
    vae: Any = AutoencoderKL.from_config(read_mapping(config.vae_config))
    if not config.init_from:
        return vae, 0
    source: Any = AutoencoderKL.from_pretrained(config.init_from, dtype=torch.float32)
    known = source.config.latent_channels
    return (source if known == vae.config.latent_channels else grow_autoencoder(source, vae)), known


def make_anchor(run: Run, config: AutoencoderConfig, vae: Any, known: int) -> tuple[Any, int] | None:
    """A frozen copy of the autoencoder at the start, where latents shall stay those of `init_from`."""
    if not config.anchor_weight:
        return None
    frozen = copy.deepcopy(vae).to(run.device, memory_format=torch.channels_last)
    return frozen.eval().requires_grad_(False), known


def train_autoencoder(run: Run, config: AutoencoderConfig) -> Path:
    """Train, then write ``vae/``, the averaged weights in bf16 with their latent statistics.

    Returns:
        The folder.
    """
    records = split_records(config, "train", ("all",))
    sprites = sprites_for(run, records)
    vae, known = load_autoencoder(config)
    anchor = make_anchor(run, config, vae, known)
    run.say(
        f"{len(records):,} pictures; encoder {parameter_count(vae.encoder):,} and decoder "
        f"{parameter_count(vae.decoder):,} parameters"
    )
    module: Any = Reconstruction(vae)
    module.to(memory_format=torch.channels_last)
    architecture = {
        key: value for key, value in vae.config.items() if key not in ("scaling_factor", "shift_factor")
    }
    state = prepare_state(run, module, _plain(architecture))
    task = AutoencoderTask(run, config, sprites, state, anchor)
    try:
        fit(run, state, task)
    finally:
        task.close()
    target = run.output / "vae"
    if run.is_main:
        task.sample(state.step)
        save_autoencoder(task, target)
        run.say(f"wrote {target}")
    run.accelerator.wait_for_everyone()
    return target


def save_autoencoder(task: AutoencoderTask, target: Path) -> None:
    """Write the averaged weights in bf16; the configuration carries shift and scale for latents ~ N(0, 1).

    Where the latents were held to those of an older autoencoder, shift and scale stay its own.
    """
    centre, spread = task.statistics()
    vae = task.judge()
    if not task.config.anchor_weight:
        vae.register_to_config(shift_factor=centre, scaling_factor=1 / spread)
    part = target.with_name(f".{target.name}.part")
    vae.to(torch.bfloat16).to(memory_format=torch.contiguous_format).save_pretrained(part)
    replace_folder(part, target)
    task.run.say(f"latent mean {centre:.4f}, standard deviation {spread:.4f}")


def _plain(mapping: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in mapping.items()}
