"""LoRA for the GSPN-2 pipelines: diffusers' loader with our checks and with rank and alpha kept on saving."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin

from gspn2_diffusion.pipelines.few_steps import FewStepsMixin
from gspn2_diffusion.pipelines.lora_checks import (
    check_adapter_names,
    check_hotswap,
    check_lora,
    require_peft,
)
from gspn2_diffusion.pipelines.model_folders import FEW_STEPS, WEIGHT_NAME

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _ClassOrInstanceMethod:
    """A method that gets the instance, or the class where there is none: diffusers calls it on the class."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> MethodType:
        return MethodType(self.function, owner if instance is None else instance)


class GSPN2LoraLoaderMixin(FewStepsMixin):
    """LoRA and DoRA adapters of the transformer, from safetensors only; needs the package peft.

    ``set_adapters``, ``get_active_adapters``, ``get_list_adapters``, ``enable_lora``, ``disable_lora``,
    ``unfuse_lora``, ``unload_lora_weights`` and ``enable_lora_hotswap`` are diffusers' own.
    """

    transformer: Any

    @classmethod
    def lora_state_dict(  # type: ignore[override]
        cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any
    ) -> Any:
        """As ``SanaLoraLoaderMixin.lora_state_dict``, never unpickling.

        Raises:
            ValueError: ``use_safetensors=False``, or the name of a pickled file.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors` must be True: weights are never unpickled, got False")
        for name in (pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")):
            if isinstance(name, (str, os.PathLike)) and os.fspath(name).endswith(_PICKLED):
                raise ValueError(f"LoRA weights must be in a safetensors file, got {os.fspath(name)!r}")
        return super().lora_state_dict(pretrained_model_name_or_path_or_dict, use_safetensors=True, **kwargs)

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds the adapter of a folder, a file's folder (``weight_name=``), a Hub id or a state dict.

        Args:
            pretrained_model_name_or_path_or_dict: where the weights are.
            adapter_name: a name for :meth:`set_adapters`; by default ``default_0``, ``default_1``, ...
            hotswap: put the weights in the place of those of the adapter ``adapter_name``; when the new rank
                is larger, call ``enable_lora_hotswap(target_rank=...)`` before loading the first one.
            kwargs: as diffusers takes them (``weight_name``, ``subfolder``, ``revision``, ...).

        Raises:
            ImportError: peft is not installed.
            ValueError: the adapter does not fit the transformer (modules, shapes, rank), its name is in use,
                or there is nothing to swap.
        """
        require_peft("load_lora_weights")
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, os.PathLike):
            source = os.fspath(source)
        state_dict, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        check_lora(self.transformer, state_dict, metadata)
        if hotswap:
            check_hotswap(self.transformer, adapter_name, state_dict)
        super().load_lora_weights(source, adapter_name=adapter_name, hotswap=hotswap, **kwargs)

    @_ClassOrInstanceMethod
    def save_lora_weights(
        self_or_cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Saves an adapter with its rank and alpha.

        On a pipeline, ``pipe.save_lora_weights(folder)`` saves its active adapter, or ``adapter_name``.
        On the class it takes the layers and their metadata, as in diffusers' training scripts.

        Args:
            save_directory: made if it is not there.
            transformer_lora_layers: as ``get_peft_model_state_dict`` gives them; the adapter's by default.
            is_main_process: False saves nothing.
            weight_name: ``pytorch_lora_weights.safetensors`` by default.
            save_function: called with the state dict and a file name instead of safetensors' own.
            safe_serialization: only True.
            transformer_lora_adapter_metadata: ``LoraConfig.to_dict()``; the adapter's by default.
            adapter_name: which adapter of this pipeline.

        Raises:
            ImportError: peft is not installed.
            ValueError: no layers, no or several adapters to choose from, or an unknown adapter.
        """
        if not safe_serialization:
            raise ValueError("`safe_serialization` must be True: weights are never pickled, got False")
        if not is_main_process:
            return
        layers, metadata = transformer_lora_layers, transformer_lora_adapter_metadata
        if isinstance(self_or_cls, GSPN2LoraLoaderMixin) and (layers is None or metadata is None):
            own_layers, own_metadata = self_or_cls._adapter_to_save(adapter_name)
            layers, metadata = layers or own_layers, metadata or own_metadata
        name = weight_name or WEIGHT_NAME
        temporary = f".{name}.tmp"
        # The parent's classmethod, bound to the class that it was called on.
        owner = self_or_cls if isinstance(self_or_cls, type) else type(self_or_cls)
        SanaLoraLoaderMixin.save_lora_weights.__func__(  # type: ignore[attr-defined]
            owner,
            save_directory,
            transformer_lora_layers=layers,
            weight_name=temporary,
            save_function=save_function,
            transformer_lora_adapter_metadata=metadata,
        )
        os.replace(Path(save_directory, temporary), Path(save_directory, name))

    def _adapter_to_save(self, adapter_name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict and the configuration of one adapter."""
        require_peft("save_lora_weights")
        from peft.utils import get_peft_model_state_dict

        if adapter_name is None:
            active = [name for name in self.get_active_adapters() if name != FEW_STEPS]
            if len(active) != 1:
                raise ValueError(
                    f"`adapter_name` is needed: {len(active)} adapters are active ({active}), "
                    "one is saved at a time"
                )
            adapter_name = active[0]
        check_adapter_names(self.transformer, adapter_name)
        metadata = self.transformer.peft_config[adapter_name].to_dict()
        return get_peft_model_state_dict(self.transformer, adapter_name=adapter_name), metadata

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Makes adapters active, weighted by ``adapter_weights``: one number for all, or a list of them.

        Raises:
            ImportError: peft is not installed.
            ValueError: an unknown adapter, or a list of weights of another length.
        """
        require_peft("set_adapters")
        check_adapter_names(self.transformer, adapter_names)
        super().set_adapters(adapter_names, adapter_weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Removes adapters; raises ``ValueError`` for an unknown one, ``ImportError`` without peft."""
        require_peft("delete_adapters")
        check_adapter_names(self.transformer, adapter_names)
        super().delete_adapters(adapter_names)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the active adapters, or ``adapter_names``, to the weights; ``unfuse_lora`` takes them out.

        Raises:
            ImportError: peft is not installed.
            ValueError: an unknown adapter, or none to fuse.
        """
        require_peft("fuse_lora")
        check_adapter_names(
            self.transformer, self.get_active_adapters() if adapter_names is None else adapter_names
        )
        super().fuse_lora(components or ["transformer"], lora_scale, safe_fusing, adapter_names, **kwargs)
