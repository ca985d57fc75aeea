"""Pipeline folders: components put together, bf16 safetensors, of a size that is checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gspn2_diffusion.training.checkpoint import read_state, read_tensors, replace_folder, without_prefix


def folder_size_mb(folder: Path) -> float:
    """Size of all files in a folder, in 10^6 bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def write_pipeline(pipeline: Any, target: Path, limit_mb: float | None = None) -> float:
    """Write a pipeline in bf16 beside its name, then rename; other files of an older folder are kept.

    Args:
        pipeline: its models are turned to bf16 in place.
        target: the folder.
        limit_mb: largest size allowed, in 10^6 bytes.

    Returns:
        The size in 10^6 bytes.

    Raises:
        ValueError: the folder would be larger than `limit_mb`; nothing is written.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.to(torch.bfloat16)
    pipeline.save_pretrained(part, safe_serialization=True)
    _keep_documents(target, part)
    size = folder_size_mb(part)
    if limit_mb is not None and size > limit_mb:
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"the pipeline takes {size:.1f} MB; allowed: {limit_mb:.1f} MB")
    replace_folder(part, target)
    return size


def _keep_documents(old: Path, new: Path) -> None:
    """Carry the model card and licences over."""
    if old.is_dir():
        for path in old.iterdir():
            if path.is_file() and not (new / path.name).exists():
                shutil.copy2(path, new / path.name)


def assemble(
    *,
    vae: Path,
    transformer: Path,
    text_encoder: Path,
    tokenizer: Path,
    shift: float = 1.0,
    max_text_tokens: int = 32,
    default_steps: int | None = None,
    default_guidance_scale: float | None = None,
    few_steps: Path | None = None,
    few_steps_count: int = 4,
    balance_scans: bool = False,
) -> Any:
    """A `GSPN2Pipeline` from component folders, with a flow-matching Euler scheduler.

    `transformer` may also be a compact folder of a run, whose averaged weights are taken. `few_steps` is the
    folder of an adapter that draws in `few_steps_count` steps without guidance. `balance_scans` is for
    models that were trained at one size.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the adapter does not fit the denoiser.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, BertModel

    from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

    folders = {"vae": vae, "transformer": transformer, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"`{name}`: there is no folder {folder}")
    pipeline = GSPN2Pipeline(
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        text_encoder=BertModel.from_pretrained(text_encoder, dtype=torch.bfloat16),
        vae=AutoencoderKL.from_pretrained(vae, dtype=torch.bfloat16),
        transformer=_load_transformer(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        max_sequence_length=max_text_tokens,
        default_steps=default_steps,
        default_guidance_scale=default_guidance_scale,
        balance_scans=balance_scans,
    )
    if few_steps is not None:
        pipeline.add_few_steps(few_steps, few_steps_count)
    return pipeline


def _load_transformer(folder: Path) -> Any:
    """The denoiser of a diffusers folder, or the averaged weights of a compact folder, in bf16."""
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    if not (folder / "state.json").is_file():
        return GSPN2Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    model = GSPN2Transformer2DModel.from_config(read_state(folder)["architecture"]).to(torch.bfloat16)
    averages = without_prefix("ema", read_tensors(folder, "weights-*.safetensors"))
    missing = {name for name, _ in model.named_parameters()} - averages.keys()
    if missing:
        raise ValueError(f"{folder} lacks averaged weights: {', '.join(sorted(missing)[:5])}")
    model.load_state_dict(averages, strict=False)  # averages come without buffers
    return model
