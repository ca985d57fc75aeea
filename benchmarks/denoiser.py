"""Speed and memory of a 0.6B denoiser at 1024 x 1024 pixels; writes benchmarks/results/denoiser-<gpu>.json.

The model is 28 layers x 1152 channels with random weights, in bfloat16, on 64 x 64 tokens (VAE scale 8,
patch size 2). Speed: eager, its blocks compiled, the whole compiled, and each as a CUDA graph; a graph break
is an error. Memory: peaks of whole calls of a pipeline (with a text encoder and an autoencoder of common
sizes) as it is, and with each of diffusers' ways to save memory; what they draw is compared with the plain.
A part that fails stands under "errors" and ends the program with 1 once the others are measured.

    python benchmarks/denoiser.py --skip whole                         # about 100 s on an H200
    python benchmarks/denoiser.py --device cpu --tiny --out /tmp/x     # the same program in small, no figures
    python benchmarks/denoiser_table.py                                # the result into the documentation
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gspn2_diffusion import GSPN2Pipeline, GSPN2Transformer2DModel
from gspn2_diffusion.environment import describe_environment
from gspn2_diffusion.pipelines.model_folders import embedded_model_folder

RESULTS = Path(__file__).parent / "results"
TOKENS = 32
STEPS = 2
LARGE: dict[str, Any] = {
    "denoiser": {
        "sample_size": 128,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "mlp_ratio": 4.0,
        "caption_channels": 1024,
        "pooled_projection_dim": 1024,
    },
    "text": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "vae": (128, 256, 512, 512),
}
TINY: dict[str, Any] = {
    "denoiser": {
        "sample_size": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_channels": 32,
        "pooled_projection_dim": 32,
    },
    "text": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "vae": (8, 8, 8, 8),
}


class Bench:
    """One run of the program: its device and sizes, and the result file as it grows."""

    def __init__(
        self, device: str, sizes: dict[str, Any], backend: str, path: Path, commit: str | None
    ) -> None:
        self.device, self.sizes, self.backend, self.path = torch.device(device), sizes, backend, path
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        self.plain = torch.zeros(())  # the latents of the pipeline as it is
        self.result: dict[str, Any] = {
            **describe_environment(),
            **({"commit": commit} if commit else {}),
            "denoiser": sizes["denoiser"],
            "dtype": "bfloat16",
            "speed": {},
            "memory": {},
            "errors": {},
        }

    def attempt(self, name: str, part: Callable[[], object]) -> None:
        """Runs ``part``; what it raises is written down, so that it does not cost the parts after it."""
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            self.result["errors"][name] = f"{type(error).__name__}: {str(error)[:500]}"
            self.write()
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        self.clean()

    def write(self) -> None:
        """Writes what there is so far: a run that is cut off keeps its first parts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.result, indent=1) + "\n")
        temporary.replace(self.path)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # Models with random weights

    def denoiser(self) -> GSPN2Transformer2DModel:
        torch.manual_seed(0)
        with self.device:
            model: Any = GSPN2Transformer2DModel(**self.sizes["denoiser"])
        return model.to(self.dtype).eval().requires_grad_(False)

    def pipeline(self) -> GSPN2Pipeline:
        """All components on the CPU."""
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
        from transformers import AutoTokenizer, BertConfig, BertModel

        tokenizer = AutoTokenizer.from_pretrained(embedded_model_folder("gspn2-emoji") / "tokenizer")
        transformer: Any = self.denoiser()
        with self.device:
            text: Any = BertModel(
                BertConfig(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **self.sizes["text"])
            )
            stages = len(self.sizes["vae"])
            vae: Any = AutoencoderKL(
                block_out_channels=self.sizes["vae"],
                down_block_types=("DownEncoderBlock2D",) * stages,
                up_block_types=("UpDecoderBlock2D",) * stages,
                layers_per_block=2,
                norm_num_groups=min(32, self.sizes["vae"][0] // 4),
                latent_channels=4,
                scaling_factor=0.18215,
            )
        pipe = GSPN2Pipeline(
            tokenizer=tokenizer,
            text_encoder=text.to("cpu", self.dtype).eval(),
            vae=vae.to("cpu", self.dtype).eval(),
            transformer=transformer.to("cpu"),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            max_sequence_length=TOKENS,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # Speed

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator(self.device).manual_seed(1)
        config = self.sizes["denoiser"]
        side, width = config["sample_size"], config["caption_channels"]

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=self.device, generator=generator, dtype=self.dtype)

        return {
            "hidden_states": draw(batch, 4, side, side),
            "timestep": torch.full((batch,), 500.0, device=self.device),
            "encoder_hidden_states": draw(batch, TOKENS, width),
            "encoder_attention_mask": torch.ones(batch, TOKENS, device=self.device, dtype=torch.int64),
            "pooled_projections": draw(batch, width),
        }

    def milliseconds(self, call: Callable[[], object], repeats: int = 20) -> float:
        """Median time of a call from its launch to its end, as one step of a sampling loop takes it."""
        for _ in range(3):
            call()
        self.synchronize()
        times = []
        for _ in range(repeats if self.cuda else 2):
            began = time.perf_counter()
            call()
            self.synchronize()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)

    def graphed(self, call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        """The replay of ``call`` as a CUDA graph."""
        call()
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    @torch.no_grad()
    def measure_speed(self) -> None:
        self.result["parameters"] = sum(parameter.numel() for parameter in self.denoiser().parameters())
        for batch in (2, 1):  # guidance runs two
            self.attempt(f"batch {batch}", lambda batch=batch: self.speed_of(batch))  # type: ignore[misc]

    def speed_of(self, batch: int) -> None:
        model, inputs = self.denoiser(), self.inputs(batch)
        row: dict[str, Any] = {}

        def call() -> torch.Tensor:
            return model(**inputs, return_dict=False)[0]

        row["eager_ms"] = self.milliseconds(call)
        expected = call().float()
        if self.cuda:
            row["eager_cuda_graph_ms"] = self.milliseconds(self.graphed(call))
        self.compile_blocks(model, row, call, expected)
        self.result["speed"][f"batch {batch}"] = row
        self.report(f"batch {batch}", row)

    def report(self, name: str, row: dict[str, Any]) -> None:
        print(f"{name}: {json.dumps(row)}", flush=True)
        self.write()

    def compile_blocks(
        self,
        model: GSPN2Transformer2DModel,
        row: dict[str, Any],
        call: Callable[[], torch.Tensor],
        expected: torch.Tensor,
    ) -> None:
        began = time.perf_counter()
        model.compile_repeated_blocks(fullgraph=True, backend=self.backend)
        row["blocks_error"] = relative_error(call(), expected)
        row["blocks_compile_s"] = time.perf_counter() - began
        no_graph_breaks()
        with torch._dynamo.config.patch(error_on_recompile=True):
            row["blocks_ms"] = self.milliseconds(call)
            row["blocks_speedup"] = row["eager_ms"] / row["blocks_ms"]
            if self.cuda:
                row["blocks_cuda_graph_ms"] = self.milliseconds(self.graphed(call))

    @torch.no_grad()
    def measure_whole(self) -> None:
        """All layers compiled as one graph, which takes a minute or more: the last part of the program."""
        model, inputs, row = self.denoiser(), self.inputs(2), dict(self.result["speed"]["batch 2"])
        expected = model(**inputs, return_dict=False)[0].float()
        began = time.perf_counter()
        compiled = torch.compile(model, fullgraph=True, backend=self.backend)

        def call() -> torch.Tensor:
            return compiled(**inputs, return_dict=False)[0]

        row["whole_error"] = relative_error(call(), expected)
        row["whole_compile_s"] = time.perf_counter() - began
        no_graph_breaks()
        with torch._dynamo.config.patch(error_on_recompile=True):
            row["whole_ms"] = self.milliseconds(call)
            row["whole_speedup"] = row["eager_ms"] / row["whole_ms"]
            if self.cuda:
                row["whole_cuda_graph_ms"] = self.milliseconds(self.graphed(call))
        self.result["speed"]["batch 2"] = row
        self.report("whole, batch 2", row)

    # Memory

    def ways(self) -> dict[str, Callable[[GSPN2Pipeline], Any]]:
        """How to save memory, by name; each gets a pipeline on the CPU."""
        stream = {"use_stream": True} if self.cuda else {}

        def tiled(pipe: GSPN2Pipeline) -> None:
            pipe.to(self.device)
            pipe.vae.enable_tiling()

        def cast(pipe: GSPN2Pipeline) -> None:
            pipe.transformer.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype
            )
            pipe.to(self.device)

        def groups(pipe: GSPN2Pipeline, **options: Any) -> None:
            pipe.transformer.enable_group_offload(self.device, **options, **stream)
            pipe.text_encoder.to(self.device)
            pipe.vae.to(self.device)

        ways: dict[str, Callable[[GSPN2Pipeline], Any]] = {
            "plain": lambda pipe: pipe.to(self.device),
            "VAE tiling": tiled,
            "layerwise casting (float8)": cast,
            "group offload, blocks": lambda pipe: groups(
                pipe, offload_type="block_level", num_blocks_per_group=1
            ),
            "group offload, leaves": lambda pipe: groups(pipe, offload_type="leaf_level"),
            "model offload": lambda pipe: pipe.enable_model_cpu_offload(device=self.device),
        }
        if self.cuda:
            ways["sequential offload"] = lambda pipe: pipe.enable_sequential_cpu_offload(device=self.device)
        return ways

    def measure_memory(self) -> None:
        for name, prepare in self.ways().items():
            self.attempt(name, lambda name=name, prepare=prepare: self.memory_of(name, prepare))  # type: ignore[misc]

    def memory_of(self, name: str, prepare: Callable[[GSPN2Pipeline], Any]) -> None:
        pipe = self.pipeline()
        prepare(pipe)
        latents, row = self.call_pipeline(pipe)
        self.plain = latents if name == "plain" else self.plain
        row["latents_error"] = relative_error(latents, self.plain, 0.7 if "float8" in name else 0.05)
        self.result["memory"][name] = row
        self.report(name, row)

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def call_pipeline(self, pipe: GSPN2Pipeline) -> tuple[torch.Tensor, dict[str, Any]]:
        """Latents, and peaks in bytes and seconds of two calls: without and with decoding to pixels."""
        row: dict[str, Any] = {}
        latents = torch.empty(0)
        for key, output in (("denoising", "latent"), ("picture", "pt")):
            self.clean()
            began = time.perf_counter()
            drawn = pipe(
                "a red apple on a table",
                num_inference_steps=STEPS,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(0),
                output_type=output,
            ).images
            self.synchronize()
            row[f"{key}_s"] = round(time.perf_counter() - began, 3)
            row[f"{key}_peak_bytes"] = torch.cuda.max_memory_allocated() if self.cuda else None
            latents = drawn.float().cpu() if output == "latent" else latents
        return latents, row


def relative_error(got: torch.Tensor, expected: torch.Tensor, most: float = 0.2) -> float:
    """Norm of the difference over that of ``expected``. Rounding adds up over many layers of random weights.

    Raises:
        RuntimeError: more than ``most``, or not a number: what was measured is not the same model.
    """
    error = float((got.float() - expected).norm() / expected.norm())
    if not error < most:
        raise RuntimeError(f"wrong result: relative error {error:.2e}")
    return error


def no_graph_breaks() -> None:
    """Raises ``RuntimeError`` if the compiler split a graph since its last reset."""
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    if breaks:
        raise RuntimeError(f"graph breaks: {breaks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a few channels, to try the program")
    parser.add_argument("--backend", default="inductor", help="torch.compile's")
    parser.add_argument("--skip", choices=["speed", "memory", "whole"], action="append", default=[])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--commit", help="commit to record where there is no git history")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; --device cpu --tiny tries it without")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    path = options.out or RESULTS / f"denoiser-{name.replace(' ', '-').lower()}.json"
    bench = Bench(options.device, TINY if options.tiny else LARGE, options.backend, path, options.commit)
    speed = "speed" not in options.skip
    if speed:
        bench.measure_speed()
    if "memory" not in options.skip:
        bench.measure_memory()
    row = bench.result["speed"].get("batch 2")
    if row and "whole" not in options.skip:
        bench.attempt("whole", bench.measure_whole)
        row = bench.result["speed"]["batch 2"]
    bench.write()
    print(f"wrote {path}")
    if bench.cuda and row:
        best = max(row["blocks_speedup"], row.get("whole_speedup", 0.0))
        print(f"compiled over eager: {best:.2f}x (wanted: 1.2x)")
    if bench.result["errors"]:
        sys.exit(f"failed: {', '.join(bench.result['errors'])}")


if __name__ == "__main__":
    main()
