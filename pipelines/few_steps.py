"""The few-step adapter of a model: its place in the folder, and switching it on and off."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.loaders import SanaLoraLoaderMixin

from gspn2_diffusion.pipelines.lora_checks import check_lora, require_peft
from gspn2_diffusion.pipelines.model_folders import FEW_STEPS, WEIGHT_NAME

_OFF_FIRST = "while few steps are on: call `disable_few_steps()` first"


class FewStepsMixin(SanaLoraLoaderMixin):
    """A LoRA adapter in the model's folder (``few_steps/``) with which it draws in a few steps, unguided.

    It has the reserved name ``few_steps``. Other adapters work beside it: what sets, disables or unloads
    adapters leaves it alone.
    """

    transformer: Any
    config: Any
    _few_steps_folder: str | None = None  # where the adapter's file lies
    _set_aside: tuple[str, ...] = ()  # adapters that `disable_lora` switched off while few steps were on

    @property
    def few_steps_enabled(self) -> bool:
        """Whether the transformer has the few-step adapter now; pipelines that share it agree."""
        return FEW_STEPS in self._adapters()

    def enable_few_steps(self) -> None:
        """Draw in a few steps from now on: load the model's adapter, and use its steps and guidance scale.

        Calls that name steps or a guidance scale still get those. Without guidance a negative prompt has no
        effect. A ``scale`` in ``attention_kwargs`` applies to this adapter as well. Adapters that are active
        stay so, with their weights.

        Raises:
            ImportError: peft is not installed.
            ValueError: the model has no few-step adapter, or LoRAs are fused into its weights.
            FileNotFoundError: the adapter's file is not in the model's folder.
        """
        if self.few_steps_enabled:
            return
        if not self.config.get("few_steps"):
            raise ValueError(
                "this model has no few-step adapter (`few_steps` is not set in its configuration); "
                "scripts/distill_steps.py trains one, `add_few_steps` takes it"
            )
        require_peft("enable_few_steps")
        if getattr(self, "_merged_adapters", None):
            raise ValueError("LoRAs are fused into the weights: call `unfuse_lora()` before few steps")
        folder = os.fspath(self.few_steps_folder())
        check_lora(self.transformer, *self._read(folder))
        active = self._active_adapters()
        super().load_lora_weights(folder, FEW_STEPS, weight_name=WEIGHT_NAME)
        super().enable_lora()
        self.transformer.set_adapter([*active, FEW_STEPS])

    def disable_few_steps(self) -> None:
        """Take the few-step adapter out: steps, guidance and pictures are those of the model again."""
        if not self.few_steps_enabled:
            return
        active = [name for name in self._active_adapters() if name != FEW_STEPS]
        others = [name for name in self._adapters() if name != FEW_STEPS]
        if not others:
            super().unload_lora_weights()
            return
        with warnings.catch_warnings():  # peft would say what it activates instead
            warnings.simplefilter("ignore")
            self.transformer.set_adapter(active or others[:1])
            self.transformer.delete_adapters(FEW_STEPS)
        if not active:
            super().disable_lora()

    @contextlib.contextmanager
    def few_steps_off(self) -> Iterator[None]:
        """The model as it is without few steps, within the block."""
        enabled = self.few_steps_enabled
        self.disable_few_steps()
        try:
            yield
        finally:
            if enabled:
                self.enable_few_steps()

    def add_few_steps(self, folder: str | os.PathLike[str], steps: int, guidance_scale: float = 1.0) -> None:
        """Make an adapter the model's own; ``save_pretrained`` writes it into the folder.

        Args:
            folder: with ``pytorch_lora_weights.safetensors``, such as ``lora/`` of a run.
            steps: what a call uses that names none, once few steps are enabled; at least 1.
            guidance_scale: the same for guidance; 1 for none.

        Raises:
            FileNotFoundError: no such file.
            ValueError: ``steps`` below 1, few steps are on, or the adapter does not fit the transformer.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps` must be an integer of at least 1, got {steps!r}")
        if self.few_steps_enabled:
            raise ValueError(f"`add_few_steps` cannot be used {_OFF_FIRST}")
        check_lora(self.transformer, *self._read(os.fspath(_adapter_file(folder).parent)))
        self._few_steps_folder = os.fspath(folder)
        self.register_to_config(few_steps=steps, few_steps_guidance_scale=float(guidance_scale))  # type: ignore[attr-defined]

    def few_steps_folder(self) -> Path:
        """Where the adapter's file lies; raises ``FileNotFoundError`` if it does not."""
        folder = self._few_steps_folder
        if folder is None:  # made from the components of a pipeline that was loaded
            source = str(self.config.get("_name_or_path") or "")
            if source and not os.path.isdir(source):
                source = str(type(self).download(source))  # type: ignore[attr-defined]
            folder = os.path.join(source, FEW_STEPS)
        return _adapter_file(folder).parent

    def save_few_steps(self, folder: str | os.PathLike[str]) -> None:
        """Copy the adapter, if the model has one, into a model's folder."""
        if not self.config.get("few_steps"):
            return
        source, target = self.few_steps_folder() / WEIGHT_NAME, Path(folder) / FEW_STEPS / WEIGHT_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and os.path.samefile(source, target):
            return
        part = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(source, part)
        os.replace(part, target)

    # Other adapters, with which this one stays active

    def load_lora_weights(  # type: ignore[override]
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        if adapter_name == FEW_STEPS:
            raise ValueError(f"`adapter_name` {FEW_STEPS!r} is reserved: use `enable_few_steps()`")
        before = self._adapters()
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, **kwargs)
        new = [name for name in self._adapters() if name not in before]
        if self.few_steps_enabled and new:  # the newest takes the place of others, but not of this one
            self.transformer.set_adapter([*new, FEW_STEPS])

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.few_steps_enabled and names and FEW_STEPS not in names:
            single = not isinstance(adapter_weights, list)
            weights = [adapter_weights] * len(names) if single else list(adapter_weights)
            names, adapter_weights = [*names, FEW_STEPS], [*weights, 1.0]
        super().set_adapters(names, adapter_weights)

    def disable_lora(self) -> None:
        if not self.few_steps_enabled:
            super().disable_lora()
            return
        self._set_aside = tuple(name for name in self._active_adapters() if name != FEW_STEPS)
        self.transformer.set_adapter([FEW_STEPS])

    def enable_lora(self) -> None:
        super().enable_lora()
        if self.few_steps_enabled and self._set_aside:
            back = [name for name in self._set_aside if name in self._adapters()]
            self.transformer.set_adapter([*back, FEW_STEPS])
        self._set_aside = ()

    def unload_lora_weights(self) -> None:
        if not self.few_steps_enabled:
            super().unload_lora_weights()
            return
        self.transformer.set_adapter([FEW_STEPS])
        others = [name for name in self._adapters() if name != FEW_STEPS]
        if others:
            super().delete_adapters(others)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        if FEW_STEPS in ([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            raise ValueError(f"{FEW_STEPS!r} is reserved: use `disable_few_steps()`")
        super().delete_adapters(adapter_names)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        if self.few_steps_enabled:
            raise ValueError(f"`fuse_lora` cannot be used {_OFF_FIRST}")
        super().fuse_lora(*args, **kwargs)

    def _read(self, folder: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Weights and metadata of the adapter."""
        return self.lora_state_dict(folder, weight_name=WEIGHT_NAME, return_lora_metadata=True)

    def _adapters(self) -> list[str]:
        return list(getattr(self.transformer, "peft_config", {}))

    def _active_adapters(self) -> list[str]:
        """Those that take part in a call."""
        if not self._adapters():
            return []
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(module for module in self.transformer.modules() if isinstance(module, BaseTunerLayer))
        return [] if layer.disable_adapters else list(layer.active_adapters)


def _adapter_file(folder: str | os.PathLike[str]) -> Path:
    file = Path(folder) / WEIGHT_NAME
    if not file.is_file():
        raise FileNotFoundError(f"the few-step adapter {file} is missing")
    return file
