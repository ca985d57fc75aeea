"""Loading and saving, the same for every GSPN-2 pipeline: embedded models, safetensors only."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typing_extensions import Self

from gspn2_diffusion.pipelines.model_folders import (
    FEW_STEPS,
    FEW_STEPS_FILE,
    check_model_folder,
    class_name,
    read_index,
    remove_local_paths,
    resolve_model,
    write_pipeline_file,
)

logger = logging.getLogger(__name__)
_HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only")


class LoadablePipeline(DiffusionPipeline):
    """``DiffusionPipeline`` that knows the embedded models and never reads or writes pickled weights."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """As ``DiffusionPipeline.from_pretrained``, from safetensors only.

        ``"gspn2-emoji"`` is the model inside the package, unless a local folder has that name. Other names go
        to diffusers unchanged.

        Raises:
            ValueError: ``use_safetensors=False``.
            FileNotFoundError: no such folder, or a part of it is missing.
            OSError: a damaged folder, or a name that is neither a folder nor a reachable or cached Hub model.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("`use_safetensors` must be True: weights are never unpickled, got False")
        name = resolve_model(pretrained_model_name_or_path)
        if os.path.isdir(name):
            check_model_folder(name, passed=kwargs)
            pipe = super().from_pretrained(name, use_safetensors=True, **kwargs)
            pipe._few_steps_folder = os.path.join(os.path.abspath(name), FEW_STEPS)
            return pipe
        try:
            pipe = super().from_pretrained(name, use_safetensors=True, **kwargs)
            if pipe.config.get("few_steps"):
                hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
                pipe._few_steps_folder = os.path.join(cls.download(name, **hub), FEW_STEPS)
            return pipe
        except OSError as error:
            raise OSError(
                f"`pretrained_model_name_or_path`={name!r} is neither a local folder (looked for "
                f"{os.path.abspath(name)}), nor an embedded model, and the Hub did not give it: {error}"
            ) from error

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """As ``DiffusionPipeline.download``, with the few-step adapter, which is none of the components."""
        folder = os.fspath(super().download(pretrained_model_name, **kwargs))
        if read_index(folder).get(FEW_STEPS) and not os.path.isfile(os.path.join(folder, FEW_STEPS_FILE)):
            from huggingface_hub import hf_hub_download

            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
            hub["revision"] = os.path.basename(folder)  # the commit, so that the file gets into this folder
            with contextlib.suppress(
                OSError
            ):  # the model works without; enabling few steps says it is missing
                hf_hub_download(pretrained_model_name, FEW_STEPS_FILE, **hub)
        return folder

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As ``DiffusionPipeline.save_pretrained``, safetensors only; ``max_shard_size`` cuts into shards.

        ``push_to_hub=True`` also uploads the folder. ``safe_serialization=False`` still writes safetensors,
        and says so: weights are never pickled.
        """
        if not safe_serialization:
            logger.warning("`safe_serialization=False`: weights are never pickled, safetensors are written")
        with getattr(self, "few_steps_off", contextlib.nullcontext)():
            super().save_pretrained(os.fspath(save_directory), safe_serialization=True, **kwargs)

    def save_config(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As ``DiffusionPipeline.save_config``, with the file by which plain diffusers finds the pipeline.

        With it ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` works.
        """
        super().save_config(save_directory, push_to_hub, **kwargs)
        remove_local_paths(save_directory)
        write_pipeline_file(save_directory, type(self).__name__)
        self.save_few_steps(save_directory)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Reads an index. Called on our class, diffusers must not look for it in the folder's file again."""
        config = super()._dict_from_json_file(json_file)
        if "_class_name" in config:
            config["_class_name"] = class_name(config)
        return config
