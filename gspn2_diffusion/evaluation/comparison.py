"""Which models are compared, with equal parameters, and what their runs measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_HIDDEN_STEP = 32  # the feed-forward's hidden width is a multiple of this


def hybrid_layers(count: int, every: int = 6) -> list[str]:
    """Softmax attention in one of `every` layers, beginning in the middle of the first group."""
    return ["softmax" if number % every == every // 2 else "gspn2" for number in range(count)]


def mixer_variants(base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The four models of the comparison: changes of the base configuration."""
    return {
        "gspn2": {"mixer": "gspn2"},
        "softmax": {"mixer": "softmax"},
        "hybrid": {"mixer": hybrid_layers(int(base["num_layers"]))},
        "linear": {"mixer": "linear"},
    }


def more_mixers(base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Forms of GSPN-2 that the comparison takes in when they are asked for by name."""
    dim = int(base["num_attention_heads"]) * int(base["attention_head_dim"])
    return {
        "gspn2-proxy-C/2": {"mixer": "gspn2", "proxy_dim": dim // 2},
        "gspn2-weight-groups-4": {"mixer": "gspn2", "num_weight_groups": 4},
        "gspn2-weights-per-channel": {
            "mixer": "gspn2",
            "num_weight_groups": int(base["proxy_dim"] or dim // 8),
        },
    }


def ablation_variants(base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What users can choose: proxy width, weight groups, directions, chunks, the local perception unit."""
    dim = int(base["num_attention_heads"]) * int(base["attention_head_dim"])
    return {
        "base": {},
        "proxy-C/2": {"proxy_dim": dim // 2},
        "proxy-C/8": {"proxy_dim": dim // 8},
        "proxy-C/16": {"proxy_dim": dim // 16},
        "weight-groups-4": {"num_weight_groups": 4},
        "weights-per-channel": {"num_weight_groups": int(base["proxy_dim"] or dim // 8)},
        "down-and-right": {"scan_directions": ["down", "right"]},
        "chunks-of-4": {"chunk_size": 4},
        "chunks-of-8": {"chunk_size": 8},
        "no-local-perception": {"local_perception": False},
    }


STUDIES = {"mixers": mixer_variants, "ablations": ablation_variants}


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the denoiser of a configuration, from one and two layers of each kind in it."""
    mixer = config["mixer"]
    layers = mixer if isinstance(mixer, list) else [mixer] * int(config["num_layers"])
    total = 0
    for name in sorted(set(layers)):
        one, two = (_built({**config, "mixer": name, "num_layers": count}) for count in (1, 2))
        total += (two - one) * layers.count(name)
        rest = one - (two - one)
    return total + rest


def _built(config: Mapping[str, Any]) -> int:
    from gspn2_diffusion.models.transformer_gspn2 import GSPN2Transformer2DModel

    with torch.device("meta"):
        model: Any = GSPN2Transformer2DModel.from_config(dict(config))
    return sum(parameter.numel() for parameter in model.parameters())


def with_parameters(config: Mapping[str, Any], wanted: int) -> dict[str, Any]:
    """The configuration with the feed-forward as wide as makes its parameters most nearly `wanted`."""
    dim = int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    def sized(step: int) -> dict[str, Any]:
        # the exact ratio of a multiple of the step, so that rounding gives that multiple
        return {**config, "mlp_ratio": step * _HIDDEN_STEP / dim}

    # Parameters grow linearly with the hidden width: two counts give the line.
    first, second = count_parameters(sized(1)), count_parameters(sized(2))
    return sized(max(1, round(1 + (wanted - first) / (second - first))))


def variants(study: str, base: Mapping[str, Any], more: bool = False) -> dict[str, dict[str, Any]]:
    """Whole configurations of a study; those of "mixers" have equal parameters.

    Args:
        study: "mixers" or "ablations".
        base: the configuration that they are changes of.
        more: with those of :func:`more_mixers`.

    Raises:
        ValueError: an unknown study.
    """
    if study not in STUDIES:
        raise ValueError(f"`study` is {study!r}; allowed: {', '.join(STUDIES)}")
    changed = STUDIES[study](base)
    if study == "mixers" and more:
        changed |= more_mixers(base)
    made = {name: {**base, **changes} for name, changes in changed.items()}
    if study == "mixers":
        wanted = count_parameters(base)
        made = {
            name: config if count_parameters(config) == wanted else with_parameters(config, wanted)
            for name, config in made.items()
        }
    return made


def read_run(folder: Path) -> dict[str, Any]:
    """What a training run measured: validation curves, speed after the start, end of the run.

    Raises:
        FileNotFoundError: the run has no metrics.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.strip()]
    curve = [row for row in rows if "val_train" in row or "val_unseen_pair" in row]
    steps = [row for row in rows if "speed" in row]
    late = sorted(row["speed"] for row in steps[len(steps) // 2 :])
    facts: dict[str, Any] = {
        "validation": [
            {key: row[key] for key in ("step", "pictures", "val_train", "val_unseen_pair") if key in row}
            for row in curve
        ],
        "steps": max((row["step"] for row in rows if "step" in row), default=0),
        "pictures": max((row["pictures"] for row in rows if "pictures" in row), default=0),
        "pictures_per_second": late[len(late) // 2] if late else None,
        "memory_gib": max((row["memory"] for row in steps if "memory" in row), default=None),
    }
    if late and facts["steps"]:
        facts["step_milliseconds"] = 1000 * facts["pictures"] / facts["steps"] / late[len(late) // 2]
    return facts
