"""The feature table of docs/diffusers-compatibility.md: ours by named tests, the peers' by introspection.

Run this file to write the table into the document.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.pipelines import auto_pipeline

DOCUMENT = Path(__file__).parents[2] / "docs" / "diffusers-compatibility.md"
BEGIN, END = "<!-- feature table -->", "<!-- end of the feature table -->"


@dataclass(frozen=True)
class Peer:
    """One of diffusers' pipelines with its denoiser, asked by looking at the classes."""

    name: str
    pipeline: Any
    denoiser: Any
    block: str

    def takes(self, *names: str) -> bool:
        return set(names) <= set(inspect.signature(self.pipeline.__call__).parameters)

    def vae(self) -> Any:
        annotation = inspect.signature(self.pipeline.__init__).parameters["vae"].annotation
        return getattr(diffusers, annotation) if isinstance(annotation, str) else annotation

    def of_task(self, task: str) -> list[Any]:
        """The family's pipelines for "TEXT2IMAGE", "IMAGE2IMAGE" or "INPAINT"."""
        family = self.pipeline.__name__.removesuffix("Pipeline")
        found = getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING").values()
        return [kind for kind in found if kind.__name__.startswith(family)]

    def block_registered(self) -> bool:
        module = importlib.import_module(self.denoiser.__module__)
        block = getattr(module, self.block, None) or getattr(diffusers.models.attention, self.block)
        try:
            TransformerBlockRegistry.get(block)
        except ValueError:
            return False
        return issubclass(self.denoiser, CacheMixin)


BASIC = "BasicTransformerBlock"
PEERS = [
    Peer("Sana", diffusers.SanaPipeline, diffusers.SanaTransformer2DModel, "SanaTransformerBlock"),
    Peer(
        "PixArt-Sigma",
        diffusers.PixArtSigmaPipeline,
        diffusers.PixArtTransformer2DModel,
        "BasicTransformerBlock",
    ),
    Peer(
        "SDXL", diffusers.StableDiffusionXLPipeline, diffusers.UNet2DConditionModel, "BasicTransformerBlock"
    ),
    Peer("Flux", diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, "FluxTransformerBlock"),
]

Probe = Callable[[Peer], bool]
PIPE, MODEL = "tests/pipelines/test_", "tests/models/test_"


def common(peer: Peer) -> bool:
    return issubclass(peer.pipeline, DiffusionPipeline) and issubclass(peer.denoiser, ModelMixin)


def lora(peer: Peer) -> bool:
    return issubclass(peer.pipeline, LoraBaseMixin) and issubclass(peer.denoiser, PeftAdapterMixin)


def cache(peer: Peer) -> bool:
    return issubclass(peer.denoiser, CacheMixin)


def own_method(name: str) -> Probe:
    return lambda peer: getattr(peer.pipeline, name).__func__ is not getattr(DiffusionPipeline, name).__func__


# Feature, how to see whether a peer has it (None: not to be seen), our test (None: we do not have it).
FEATURES: dict[str, list[tuple[str, Probe | None, str | None]]] = {
    "Loading and saving": [
        ("sharded safetensors", common, PIPE + "loading.py::test_round_trip_in_shards"),
        ("variants, also in shards", common, PIPE + "loading_as_diffusers_does.py::test_variant_in_shards"),
        (
            "`dtype=`, one or by component",
            common,
            PIPE + "common_checks.py::test_dtype_reaches_every_component",
        ),
        ("`device_map` of the pipeline", common, PIPE + "memory.py::test_device_map_of_the_pipeline"),
        (
            "`device_map` of the denoiser, also to disk",
            common,
            MODEL + "memory.py::test_device_map_splits_between_memory_and_disk",
        ),
        (
            "`low_cpu_mem_usage`",
            common,
            PIPE + "loading_as_diffusers_does.py::test_low_memory_and_device_map_change_nothing",
        ),
        ("`from_pipe`", common, PIPE + "common_checks.py::test_from_pipe_shares_and_leaves_the_other_alone"),
        ("`push_to_hub`", common, PIPE + "common_checks.py::test_what_goes_to_the_hub"),
        ("`from_config`", common, "tests/models/test_config.py::test_the_emoji_preset_fits_its_budget"),
        (
            "plain `DiffusionPipeline.from_pretrained(folder)`; ours with `trust_remote_code=True`",
            common,
            PIPE + "loading_as_diffusers_does.py::test_plain_diffusers_loads_the_folder",
        ),
        ("`custom_pipeline=`", common, PIPE + "loading_as_diffusers_does.py::test_custom_pipeline"),
        (
            "refuses pickled weights",
            own_method("from_pretrained"),
            PIPE + "loading_as_diffusers_does.py::test_pickled_code_never_runs",
        ),
        (
            "public module paths in the index",
            common,
            PIPE + "loading_as_diffusers_does.py::test_module_paths_in_the_index_are_public",
        ),
        ("single-file checkpoints", lambda peer: hasattr(peer.pipeline, "from_single_file"), None),
    ],
    "LoRA": [
        ("load and save", lora, PIPE + "lora.py::test_rank_and_alpha_survive_the_round_trip"),
        (
            "rank and alpha kept without passing them",
            lambda peer: (
                lora(peer) and "adapter_name" in inspect.signature(peer.pipeline.save_lora_weights).parameters
            ),
            PIPE + "lora.py::test_rank_and_alpha_survive_the_round_trip",
        ),
        ("`set_adapters` with weights", lora, PIPE + "lora.py::test_weights_switching_and_removal"),
        ("`fuse_lora`, `unfuse_lora`", lora, PIPE + "lora_common.py::test_fusing_one_or_several"),
        ("`unload_lora_weights`", lora, PIPE + "lora.py::test_weights_switching_and_removal"),
        (
            "hot-swap",
            lambda peer: lora(peer) and hasattr(peer.pipeline, "enable_lora_hotswap"),
            PIPE + "lora.py::test_hotswap",
        ),
        (
            "hot-swap in a compiled model",
            lambda peer: lora(peer) and hasattr(peer.denoiser, "enable_lora_hotswap"),
            MODEL + "compile.py::test_lora_swaps_in_a_compiled_model_without_recompiling",
        ),
        ("DoRA", lora, MODEL + "model_lora.py::test_saved_and_loaded_with_its_configuration"),
        (
            "on the token mixer's projections",
            lora,
            MODEL + "diffusers_features.py::test_lora_on_the_mixer_projections",
        ),
        (
            "few-step adapter in the model's folder, `enable_few_steps`",
            lambda peer: hasattr(peer.pipeline, "enable_few_steps"),
            PIPE + "few_steps.py::test_on_and_off",
        ),
    ],
    "Memory": [
        (
            "model offload",
            lambda peer: peer.pipeline.model_cpu_offload_seq is not None,
            PIPE + "memory.py::test_model_offload",
        ),
        ("sequential offload", common, PIPE + "memory.py::test_sequential_offload"),
        (
            "group offload",
            lambda peer: peer.denoiser._supports_group_offloading,
            PIPE + "memory.py::test_group_offload_of_the_pipeline",
        ),
        (
            "layerwise casting with skip patterns",
            lambda peer: bool(peer.denoiser._skip_layerwise_casting_patterns),
            MODEL + "memory.py::test_layerwise_casting_spares_norms_and_the_scan",
        ),
        (
            "VAE tiling",
            lambda peer: hasattr(peer.vae(), "enable_tiling"),
            PIPE + "memory.py::test_autoencoder_tiling_decodes_pieces",
        ),
        (
            "VAE slicing",
            lambda peer: hasattr(peer.vae(), "enable_slicing"),
            PIPE + "memory.py::test_autoencoder_slicing_changes_nothing",
        ),
        ("quantisation (torchao)", common, MODEL + "quantization.py::test_eight_bit_weights"),
    ],
    "Speed": [
        (
            "`torch.compile` of the denoiser, no graph breaks",
            None,
            MODEL + "compile.py::test_compiled_on_a_gpu",
        ),
        (
            "`compile_repeated_blocks`",
            lambda peer: bool(peer.denoiser._repeated_blocks),
            MODEL + "compile.py::test_repeated_blocks_share_one_graph",
        ),
        ("one compilation for all sizes", None, MODEL + "compile.py::test_one_graph_for_all_sizes"),
        ("CUDA graphs", None, MODEL + "compile.py::test_cuda_graph_of_the_denoiser"),
        ("FirstBlockCache", Peer.block_registered, PIPE + "caches.py::test_cached_pictures"),
        ("MagCache", Peer.block_registered, PIPE + "caches.py::test_cached_pictures"),
        ("TaylorSeer", cache, PIPE + "caches.py::test_cached_pictures"),
        ("PyramidAttentionBroadcast", cache, PIPE + "caches.py::test_cached_pictures"),
        ("FasterCache", cache, PIPE + "caches.py::test_cached_pictures"),
        (
            "a cache that cannot apply raises",
            lambda peer: cache(peer) and "enable_cache" in vars(peer.denoiser),
            MODEL + "caches.py::test_caches_that_cannot_apply_raise",
        ),
    ],
    "Sampling": [
        ("Euler (flow matching)", None, PIPE + "pipeline_gspn2.py::test_equals_a_sampler_written_by_hand"),
        (
            "Heun, DPM-Solver++ and UniPC (flow) by scheduler swap",
            None,
            PIPE + "schedulers.py::test_other_solvers_reach_the_same_end",
        ),
        ("SDE solvers", None, PIPE + "schedulers.py::test_swap_from_config_keeps_working"),
        (
            "explicit sigmas",
            lambda peer: peer.takes("sigmas"),
            PIPE + "schedulers.py::test_explicit_schedules",
        ),
        (
            "guidance interval",
            lambda peer: peer.takes("guidance_interval"),
            PIPE + "guidance.py::test_interval_saves_denoiser_work",
        ),
        (
            "guidance rescale",
            lambda peer: peer.takes("guidance_rescale"),
            PIPE + "guidance.py::test_rescale_reaches_the_picture",
        ),
        (
            "guiders, such as APG",
            lambda peer: peer.takes("guider"),
            PIPE + "guidance.py::test_adaptive_projected_guidance",
        ),
        (
            "`callback_on_step_end` with tensors",
            lambda peer: peer.takes("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
            PIPE + "callbacks.py::test_sees_every_step_and_the_tensors_it_asked_for",
        ),
        (
            "`interrupt`",
            lambda peer: hasattr(peer.pipeline, "interrupt"),
            PIPE + "callbacks.py::test_interrupt_stops_after_the_step_and_is_forgotten_by_the_next_call",
        ),
        (
            "prompt embeddings out and in",
            lambda peer: peer.takes("prompt_embeds") and hasattr(peer.pipeline, "encode_prompt"),
            PIPE + "common_checks.py::test_prompts_can_be_encoded_apart",
        ),
        (
            "a generator per picture",
            lambda peer: peer.takes("generator"),
            PIPE + "pipeline_gspn2.py::test_each_picture_of_a_batch_equals_it_alone",
        ),
        (
            "attention masks for padded prompts",
            lambda peer: peer.takes("prompt_attention_mask"),
            PIPE + "pipeline_gspn2.py::test_masked_tokens_and_lengths_of_embeddings_do_not_matter",
        ),
    ],
    "Tasks": [
        (
            "text to image through AutoPipeline",
            lambda peer: bool(peer.of_task("TEXT2IMAGE")),
            PIPE + "auto_pipelines.py::test_from_pretrained",
        ),
        (
            "image to image",
            lambda peer: bool(peer.of_task("IMAGE2IMAGE")),
            PIPE + "img2img.py::test_strength",
        ),
        (
            "inpainting",
            lambda peer: bool(peer.of_task("INPAINT")),
            PIPE + "inpaint.py::test_pixels_outside_the_mask_are_the_pictures_own",
        ),
        (
            "`padding_mask_crop`",
            lambda peer: any(
                "padding_mask_crop" in inspect.signature(kind.__call__).parameters
                for kind in peer.of_task("INPAINT")
            ),
            PIPE + "inpaint.py::test_padding_mask_crop_draws_the_surroundings_and_keeps_the_rest",
        ),
        ("IP-Adapter", lambda peer: hasattr(peer.pipeline, "load_ip_adapter"), None),
    ],
    "Types": [
        (
            "`py.typed`",
            lambda peer: (Path(diffusers.__file__).parent / "py.typed").is_file(),
            "tests/pipelines/test_documentation.py::test_the_package_is_typed",
        ),
        (
            "API reference, its examples executed by tests",
            None,
            "tests/pipelines/test_documentation.py::test_examples_of_the_api_reference",
        ),
    ],
}


def render() -> str:
    """The table in Markdown."""
    lines = ["| Feature | GSPN2 | " + " | ".join(peer.name for peer in PEERS) + " | Our test |"]
    lines.append("|" + "---|" * (len(PEERS) + 3))
    for group, rows in FEATURES.items():
        lines.append(f"| **{group}** |" + " |" * (len(PEERS) + 2))
        for feature, probe, test in rows:
            theirs = ["?" if probe is None else "yes" if probe(peer) else "no" for peer in PEERS]
            own = "yes" if test else "no"
            lines.append(f"| {feature} | {own} | {' | '.join(theirs)} | {f'`{test}`' if test else ''} |")
    return "\n".join(lines)


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{render()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
