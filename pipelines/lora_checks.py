"""What a LoRA file must fulfil before it touches the transformer; every message says what came."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND

PREFIX = "transformer."


def check_adapter_names(transformer: Any, names: Any) -> None:
    """Raises ``ValueError`` unless ``names``, one or a list, are adapters of ``transformer``."""
    names = [names] if isinstance(names, str) else list(names)
    loaded = list(getattr(transformer, "peft_config", {}))
    unknown = [name for name in names if name not in loaded]
    if unknown or not names:
        raise ValueError(
            f"unknown LoRA adapters: {unknown} not in the list of present adapters: {loaded or 'none loaded'}"
        )


def check_lora(
    transformer: Any, state_dict: dict[str, torch.Tensor], metadata: dict[str, Any] | None
) -> None:
    """Raises ``ValueError`` unless the layers of ``state_dict`` are those of ``transformer``.

    Checked are the modules' names, the shapes ``lora_A (r, in)`` and ``lora_B (out, r)``, that both have the
    same rank, and that it is one that the metadata names. Layouts other than peft's are left to diffusers, as
    are files without any layer for the transformer or with half a pair, of which it warns.
    """
    pairs = lora_pairs(state_dict)
    modules = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()}
    unknown = [name for name in pairs if name not in modules]
    if unknown:
        raise ValueError(
            f"the LoRA is for another model: this transformer has no {_some(unknown)} "
            f"({len(unknown)} such modules)"
        )
    allowed = _ranks_of(metadata)
    for name, (down, up) in pairs.items():
        _check_pair(name, down, up, base_layer(transformer, name))
        if allowed and down is not None and down.shape[0] not in allowed:
            raise ValueError(
                f"the LoRA's metadata has the ranks {sorted(allowed)}, "
                f"its layer {name} has rank {down.shape[0]}"
            )


def check_hotswap(transformer: Any, adapter_name: str | None, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ``ValueError`` unless the new weights fit into the place of the adapter ``adapter_name``."""
    if adapter_name is None:
        raise ValueError("`adapter_name` is needed with `hotswap=True`: the adapter to be replaced")
    check_adapter_names(transformer, adapter_name)
    for name, (down, _) in lora_pairs(state_dict).items():
        layers = getattr(transformer.get_submodule(name), "lora_A", None)
        if layers is None or adapter_name not in layers:
            raise ValueError(
                f"cannot hot-swap {adapter_name!r}: it has no layer {name}, the new LoRA has one"
            )
        room = layers[adapter_name].weight.shape[0]
        if down is not None and down.shape[0] > room:
            raise ValueError(
                f"cannot hot-swap {adapter_name!r}: the layer {name} has room for rank {room}, "
                f"the new LoRA has rank {down.shape[0]}; call "
                f"`enable_lora_hotswap(target_rank={down.shape[0]})` before loading the first adapter"
            )


def lora_pairs(state_dict: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor | None]]:
    """``lora_A`` and ``lora_B`` by module name, for the keys that are in peft's layout."""
    pairs: dict[str, list[torch.Tensor | None]] = {}
    for key, tensor in state_dict.items():
        for index, part in enumerate((".lora_A.weight", ".lora_B.weight")):
            if key.startswith(PREFIX) and key.endswith(part):
                pairs.setdefault(key.removeprefix(PREFIX).removesuffix(part), [None, None])[index] = tensor
    return pairs


def base_layer(transformer: Any, name: str) -> Any:
    """The module ``name`` itself, also under the adapters that it already has."""
    module = transformer.get_submodule(name)
    return getattr(module, "base_layer", module)


def _check_pair(name: str, down: torch.Tensor | None, up: torch.Tensor | None, layer: Any) -> None:
    if down is None or up is None:
        return
    if down.shape[0] != up.shape[1]:
        raise ValueError(
            f"the LoRA's layer {name} has mismatched ranks: lora_A has {down.shape[0]}, "
            f"lora_B has {up.shape[1]}"
        )
    weight = getattr(layer, "weight", None)
    if weight is None:
        raise ValueError(
            f"the LoRA's layer {name} is a {type(layer).__name__} in this transformer, without weights"
        )
    if isinstance(layer, torch.nn.Linear) and (up.shape[0], down.shape[1]) != tuple(weight.shape):
        raise ValueError(
            f"the LoRA's layer {name} is made for weights {(up.shape[0], down.shape[1])}, "
            f"this transformer has {tuple(weight.shape)}"
        )


def _ranks_of(metadata: dict[str, Any] | None) -> set[int]:
    own = {key.removeprefix(PREFIX): value for key, value in (metadata or {}).items()}
    return {own["r"], *own.get("rank_pattern", {}).values()} if "r" in own else set()


def _some(names: Any) -> str:
    return ", ".join(list(names)[:3]) or "nothing"


def require_peft(method: str) -> None:
    """Raises ``ImportError`` unless peft is installed in a version that diffusers works with."""
    if not USE_PEFT_BACKEND:
        raise ImportError(f"`{method}` needs the package peft: pip install 'peft>=0.17'")
