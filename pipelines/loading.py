"""Loading and saving, the same for every GSPN-2 pipeline: embedded models, safetensors only."""

from __future__ import annotations

import logging
import os
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from typing_extensions import Self

from gspn2_diffusion.pipelines.model_folders import (
    check_model_folder,
    class_name,
    remove_local_paths,
    resolve_model,
    write_pipeline_file,
)

logger = logging.getLogger(__name__)


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
            return super().from_pretrained(name, use_safetensors=True, **kwargs)
        try:
            return super().from_pretrained(name, use_safetensors=True, **kwargs)
        except OSError as error:
            raise OSError(
                f"`pretrained_model_name_or_path`={name!r} is neither a local folder (looked for "
                f"{os.path.abspath(name)}), nor an embedded model, and the Hub did not give it: {error}"
            ) from error

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        """As ``DiffusionPipeline.save_pretrained``, safetensors only; ``max_shard_size`` cuts into shards.

        ``push_to_hub=True`` also uploads the folder. ``safe_serialization=False`` still writes safetensors,
        and says so: weights are never pickled.
        """
        if not safe_serialization:
            logger.warning("`safe_serialization=False`: weights are never pickled, safetensors are written")
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

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """Reads an index. Called on our class, diffusers must not look for it in the folder's file again."""
        config = super()._dict_from_json_file(json_file)
        if "_class_name" in config:
            config["_class_name"] = class_name(config)
        return config
