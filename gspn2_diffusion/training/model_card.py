"""The model card of a trained folder: what it was made from, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.training.config import DenoiserConfig
from gspn2_diffusion.training.runtime import Run, parameter_count
from gspn2_diffusion.training.state import TrainState

_SHOWN = (
    "data",
    "resolution",
    "batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "ema_decay",
    "caption_dropout",
    "prediction",
    "weighting",
    "train_shift",
    "mixed_precision",
    "seed",
    "rank",
    "alpha",
    "dora",
    "lora_rank",
    "lora_alpha",
    "student_steps",
    "teacher_steps",
    "teacher_guidance",
    "class_prompt",
    "prior_weight",
)


def write_card(folder: Path, config: DenoiserConfig, state: TrainState, run: Run) -> None:
    """Write ``README.md`` unless one is there, which somebody has written by hand."""
    if (folder / "README.md").exists():
        return
    part = folder / ".README.md.part"
    part.write_text(card_text(config, state, run, folder), encoding="utf-8")
    part.replace(folder / "README.md")


def card_text(
    config: DenoiserConfig, state: TrainState, run: Run, folder: Path | None = None, adapter: bool = False
) -> str:
    """Markdown with the front matter that the Hub reads; of an adapter, or of a whole pipeline."""
    rows = [f"| {name} | {getattr(config, name)} |" for name in _SHOWN if hasattr(config, name)]
    about = describe_environment()
    machine = f"{run.world} process(es), GPU {about['gpu']}, torch {about['torch']}, commit {about['commit']}"
    tags = "- gspn-2\n- text-to-image\n" + ("- lora\n" if adapter else "")
    front = f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags:\n{tags}---\n"
    base = _base_name(config) if adapter else "this folder"
    steps = getattr(config, "student_steps", None) if adapter else None
    few = f", num_inference_steps={steps}, guidance_scale=1" if steps else ""
    use = _usage(folder, f'"{base}"', adapter, few)
    title = "# A LoRA adapter for a GSPN-2 model\n" if adapter else "# A GSPN-2 text-to-image model\n"
    measures = "".join(f"- {name}: {value:.4f}\n" for name, value in last_measures(run.output).items())
    return "\n".join(
        [
            front,
            title,
            f"{parameter_count(state.module):,} parameters, trained for {state.step:,} steps on "
            f"{state.pictures:,} pictures (repeats counted).\n",
            use,
            "## Training\n",
            "| setting | value |\n|---|---|",
            *rows,
            f"\n{machine}. The whole configuration is in the run's config.json.\n",
            *(["## Measures at the end\n", measures] if measures else []),
            "## Before passing it on\n",
            "State the licence of the pictures, what the model is for, and what it should not be used for.\n",
        ]
    )


def _usage(folder: Path | None, source: str, adapter: bool, settings: str) -> str:
    """How to draw with it: with our pipeline, or with the one of diffusers that the folder names."""
    index = None if folder is None else folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8"))["_class_name"] if index and index.is_file() else ""
    if isinstance(name, str) and name and not name.startswith("GSPN2"):
        lines = [
            "import gspn2_diffusion  # knows the converted denoiser",
            "from diffusers import DiffusionPipeline",
        ]
        kind = "DiffusionPipeline"
    else:
        lines, kind = ["from gspn2_diffusion import GSPN2Pipeline"], "GSPN2Pipeline"
    lines += ["", f"pipe = {kind}.from_pretrained({source})"]
    lines += ['pipe.load_lora_weights("this folder")'] if adapter else []
    lines.append(f'pipe("a prompt"{settings}).images[0].save("picture.png")')
    return "\n".join(["```python", *lines, "```\n"])


def _base_name(config: DenoiserConfig) -> str:
    """The tuned model's name, without the folders of this machine."""
    return Path(config.init_from or str(config.pretrained)).name


def last_measures(folder: Path) -> dict[str, float]:
    """The newest validation measures in ``metrics.jsonl``."""
    found: dict[str, float] = {}
    file = folder / "metrics.jsonl"
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            row: dict[str, Any] = json.loads(line)
            found.update({key: value for key, value in row.items() if key.startswith(("val_", "gap_"))})
    return found
