"""The classes of converted models: those of diffusers, that save and load what was converted.

Saved pipelines name them ``["gspn2_diffusion.conversion", "GSPN2..."]``; this never changes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)

from gspn2_diffusion.conversion.convert import CONFIG_KEY, PACKAGE, rebuild
from gspn2_diffusion.layers.mixer import GSPN2Mixer, check_scan_backend

# diffusers without this package would build the model with attention and find no weights for it. It stops at
# a quantisation method that it does not know and prints its name: the one place for a word of advice.
_GUARD_KEY = "quantization_config"
_GUARD = {
    "quant_method": f"none (this model has GSPN-2 line scans: pip install {PACKAGE}, then "
    "`import gspn2_diffusion` and load it with the class that _class_name in its config.json names, "
    "from gspn2_diffusion.conversion; in a pipeline's folder that class belongs into model_index.json)"
}


class _Converted:
    """What every converted class adds to its model."""

    def set_scan_backend(self, backend: str) -> None:
        """Choose the backend of every scan: "auto", "cupy" or "reference".

        Raises:
            ValueError: an unknown backend.
        """
        check_scan_backend(backend)
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, GSPN2Mixer):
                module.backend = backend

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers', and the note for those who load the folder without this package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        file = Path(save_directory) / self.config_name  # type: ignore[attr-defined]
        config = json.loads(file.read_text(encoding="utf-8"))
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps({**config, _GUARD_KEY: _GUARD}, indent=2, sort_keys=True) + "\n")
        temporary.replace(file)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', without the note of :meth:`save_config`."""
        loaded = super().load_config(*args, **kwargs)  # type: ignore[misc]
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get(_GUARD_KEY) == _GUARD:
            config.pop(_GUARD_KEY)
        return loaded

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'; ``config`` records what was converted.

        Raises:
            ValueError: it does not.
        """
        conversion = (config or {}).get(CONFIG_KEY)
        if not conversion:
            raise ValueError(
                f"config has no {CONFIG_KEY!r}: load {cls.__mro__[2].__name__} and use convert_to_gspn2."
            )
        rest = {key: value for key, value in config.items() if key not in (CONFIG_KEY, _GUARD_KEY)}
        built = super().from_config(rest, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        rebuild(built[0] if return_unused_kwargs else built, conversion)
        return built


class GSPN2UNet2DConditionModel(_Converted, UNet2DConditionModel):  # type: ignore[misc]
    """A converted ``UNet2DConditionModel``."""

    _skip_layerwise_casting_patterns = ["norm", "to_scan"]  # type: ignore[assignment]  # noqa: RUF012


class GSPN2PixArtTransformer2DModel(_Converted, PixArtTransformer2DModel):  # type: ignore[misc]
    """A converted ``PixArtTransformer2DModel``."""

    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "adaln_single", "to_scan"]  # type: ignore  # noqa: RUF012
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012


class GSPN2SanaTransformer2DModel(_Converted, SanaTransformer2DModel):  # type: ignore[misc]
    """A converted ``SanaTransformer2DModel``."""

    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "to_scan"]  # type: ignore  # noqa: RUF012
    _repeated_blocks = ["SanaTransformerBlock"]  # noqa: RUF012


class GSPN2DiTTransformer2DModel(_Converted, DiTTransformer2DModel):  # type: ignore[misc]
    """A converted ``DiTTransformer2DModel``."""

    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "to_scan"]  # type: ignore  # noqa: RUF012
    _repeated_blocks = ["BasicTransformerBlock"]  # noqa: RUF012


_CLASSES: dict[type, type] = {
    cls.__mro__[2]: cls
    for cls in (
        GSPN2UNet2DConditionModel,
        GSPN2PixArtTransformer2DModel,
        GSPN2SanaTransformer2DModel,
        GSPN2DiTTransformer2DModel,
    )
}
for _cls in _CLASSES.values():
    _cls.__module__ = "gspn2_diffusion.conversion"  # what diffusers writes into model_index.json


def become_converted(model: Any) -> None:
    """Turn a model of diffusers into one of its converted class, in place."""
    if isinstance(model, _Converted):
        return
    base = next(cls for cls in type(model).__mro__ if cls in _CLASSES)
    model.__class__ = _CLASSES[base]
