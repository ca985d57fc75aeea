"""torch.compile: no graph breaks, no recompilation for other sizes, repeated blocks, export, LoRA swaps.

On the CPU the scan is a Python loop over lines, which a compiler unrolls for one size. So these tests give
the CUDA operator a CPU implementation and let the denoiser call it, as it does on a GPU.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_denoiser import make_inputs, make_model, randomize

from gspn2_diffusion.ops.reference import line_scan_reference

line_scan = importlib.import_module("gspn2_diffusion.ops.line_scan")
SIZES = [(8, 12, 2), (12, 8, 2), (16, 16, 3), (6, 20, 5)]  # height, width, batch
NAMES = ["to_q", "to_k", "to_v", "to_out.0", "to_proxy"]


def on_cpu(
    x: Any, weight: Any, lam: Any, u: Any, directions: Any, chunk_size: int, normalize: bool, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    names = [line_scan.DIRECTIONS[code] for code in directions]
    y = line_scan_reference(x, weight, lam, u, names, chunk_size or None, normalize)
    return y, x.new_empty(0)


@pytest.fixture(autouse=True)
def own_compiler_cache() -> Iterator[None]:
    torch.compiler.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):  # equal sizes are not the same size
        yield
    torch.compiler.reset()


@pytest.fixture
def operator_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def choose(backend: str, x: torch.Tensor) -> str:
        return "cupy" if torch.compiler.is_compiling() else "reference"

    monkeypatch.setattr(line_scan, "choose_backend", choose)
    with torch.library._scoped_library("gspn2_diffusion", "IMPL") as library:
        library.impl("line_scan_forward", on_cpu, "CPU")
        yield


class Counter:
    """A compiler that runs what it gets, and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.slow
def test_one_graph_for_all_sizes(operator_on_cpu: None) -> None:
    model = make_model(num_layers=1)
    expected = [model(**make_inputs(*size)).sample.detach() for size in SIZES]
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size, sample in zip(SIZES, expected, strict=True):
            torch.testing.assert_close(compiled(**make_inputs(*size)).sample, sample)
    assert len(counter.graphs) == 1
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes]
    assert sum("line_scan" in target for target in targets) == 1  # one operator, no unrolled lines
    assert not any("repeat_interleave" in target for target in targets)  # fixes the batch size in torch 2.11


@pytest.mark.slow
def test_repeated_blocks_share_one_graph(operator_on_cpu: None) -> None:
    model = make_model()
    expected = [model(**make_inputs(*size)).sample.detach() for size in SIZES]
    counter = Counter()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size, sample in zip(SIZES, expected, strict=True):
            torch.testing.assert_close(model(**make_inputs(*size)).sample, sample)
    assert len(counter.graphs) == 1


@pytest.mark.slow
def test_compiles_without_graph_breaks_also_backward() -> None:
    model = make_model(num_layers=1)
    model.set_scan_backend("reference")
    randomize(model)
    inputs = make_inputs(4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(**inputs).sample
    sample = compiled(**inputs).sample
    torch.testing.assert_close(sample, expected)
    sample.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.gpu
def test_compiles_with_group_offload() -> None:
    model = make_model(num_layers=3)
    inputs = {name: value.cuda() for name, value in make_inputs().items()}
    with torch.no_grad():
        expected = make_model(num_layers=3).to("cuda")(**inputs).sample
        model.enable_group_offload(
            torch.device("cuda"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
        model.compile()
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).sample, expected, atol=1e-3, rtol=1e-3)


def test_export_and_run() -> None:
    model = make_model(num_layers=1)
    inputs = make_inputs(4, 4)
    exported = torch.export.export(model, args=(), kwargs=inputs)
    torch.testing.assert_close(exported.module()(**inputs).sample, model(**inputs).sample)


def package_ahead_of_time(path: str, device: str) -> None:
    """Write AOTInductor's package, the inputs and what the denoiser makes of them."""
    model = make_model(num_layers=1).to(device)
    inputs = {name: value.to(device) for name, value in make_inputs(8, 12).items()}
    with torch.no_grad():
        torch.save((inputs, model(**inputs).sample), f"{path}.pt")
        exported = torch.export.export(model, args=(), kwargs=inputs)
        torch._inductor.aoti_compile_and_package(exported, package_path=path)


def run_package(path: str, device: str) -> None:
    """Load and call what `package_ahead_of_time` wrote."""
    inputs, expected = torch.load(f"{path}.pt", map_location=device)
    print("loading", file=sys.stderr, flush=True)
    loaded = torch._inductor.aoti_load_package(path)
    print("calling", file=sys.stderr, flush=True)
    torch.testing.assert_close(loaded(**inputs).sample, expected, atol=1e-3, rtol=1e-3)


def linear_ahead_of_time(path: str, device: str) -> None:
    """The same with nothing of ours: does torch load a package of its own here?"""
    x = torch.ones(4, 4, device=device)
    model = torch.nn.Linear(4, 4, device=device)
    with torch.no_grad():
        exported = torch.export.export(model, args=(x,))
        loaded = torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(exported, package_path=path)
        )
        torch.testing.assert_close(loaded(x), model(x), atol=1e-3, rtol=1e-3)


def alone(task: Callable[[str, str], None], path: Path, device: str) -> tuple[int, str]:
    """Exit code, negative for a signal, and messages of a task in a process that has done nothing else.

    After a crash the messages hold the stacks of C++ and of Python, those of the thread that crashed first.
    """
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "faulthandler", __file__, task.__name__, str(path), device]
    done = subprocess.run(command, env=os.environ | paths, stderr=subprocess.PIPE, text=True, timeout=300)
    said = done.stderr
    return done.returncode, said if len(said) < 12_000 else f"{said[:9000]}\n...\n{said[-3000:]}"


@pytest.mark.gpu
def test_packaged_ahead_of_time(tmp_path: Path) -> None:
    """AOTInductor's package calls the scan's operator in the process that loads it: not in this one, for a
    package that is wrong ends the process, and with it the tests that wait for their turn there."""
    for task in (package_ahead_of_time, run_package):
        code, messages = alone(task, tmp_path / "model.pt2", "cuda")
        if code:
            other, others = alone(linear_ahead_of_time, tmp_path / "linear.pt2", "cuda")
            if other:
                pytest.skip(f"torch {torch.__version__} cannot load its own packages here:\n{others[-300:]}")
            pytest.fail(f"{task.__name__} ended with {code}:\n{messages}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(7, 13)])
def test_lora_swaps_in_a_compiled_model_without_recompiling(tmp_path: Path, ranks: tuple[int, int]) -> None:
    peft = pytest.importorskip("peft")
    inputs, expected = make_inputs(4, 4), []
    model = make_model(num_layers=1)
    for index, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=NAMES, init_lora_weights=False)
        model.add_adapter(config, adapter_name=f"adapter{index}")
        model.set_adapter(f"adapter{index}")
        expected.append(model(**inputs).sample.detach())
        model.save_lora_adapter(tmp_path / str(index), adapter_name=f"adapter{index}")
    model = make_model(num_layers=1)
    model.enable_lora_hotswap(target_rank=max(ranks))
    model.load_lora_adapter(tmp_path / "0", adapter_name="slot", prefix=None, use_safetensors=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(**inputs).sample, expected[0], atol=1e-4, rtol=1e-4)
        model.load_lora_adapter(
            tmp_path / "1", adapter_name="slot", hotswap=True, prefix=None, use_safetensors=True
        )
        torch.testing.assert_close(compiled(**inputs).sample, expected[1], atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "regional"),
    [("default", False), ("default", True), ("reduce-overhead", False)],
    ids=["whole", "blocks", "CUDA graphs"],
)
def test_compiled_on_a_gpu(mode: str, regional: bool) -> None:
    """With "reduce-overhead" as CUDA graphs."""
    model = make_model(num_layers=3).to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs(16, 24).items()}
    with torch.no_grad():
        expected = model(**inputs).sample
        if regional:
            model.compile_repeated_blocks(fullgraph=True, mode=mode)
            compiled = model
        else:
            compiled = torch.compile(model, fullgraph=True, mode=mode)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                torch.testing.assert_close(compiled(**inputs).sample, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["gspn2", "softmax", "linear"])
def test_one_compilation_for_all_sizes_on_a_gpu(mixer: str) -> None:
    model = make_model(mixer=mixer).to("cuda")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in SIZES:
            inputs = {name: value.cuda() for name, value in make_inputs(*size).items()}
            torch.testing.assert_close(
                compiled(**inputs).sample, model(**inputs).sample, atol=1e-3, rtol=1e-3
            )


@pytest.mark.gpu
def test_cuda_graph_of_the_denoiser() -> None:
    model = make_model().to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs(16, 16).items()}
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first call compiles kernels and picks algorithms
            model(**inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sample = model(**inputs).sample
        inputs["hidden_states"].mul_(-1)
        graph.replay()
        torch.testing.assert_close(sample, model(**inputs).sample, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    globals()[sys.argv[1]](*sys.argv[2:])
