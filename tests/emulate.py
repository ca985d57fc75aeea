"""Runs the kernels on the processor: g++ compiles them with ``emulator/`` in place of the PTX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from scan_cases import poisoned_memory

from gspn2_diffusion.ops import (
    ada_layer_norm_kernels,
    cupy_backend,
    launches,
    local_perception_kernels,
)
from gspn2_diffusion.ops.plans import Plan

SHARED_LIMIT = 227 * 1024
# Where GSPN2_REQUIRE_COMPILER is set, a compiler that is missing fails the tests instead of skipping them.
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and "GSPN2_REQUIRE_COMPILER" not in os.environ, reason="needs g++"
)
HERE = Path(__file__).parent / "emulator"
PROBLEMS = {
    1: "nothing could go on: a deadlock",
    2: "something was sent that nobody waited for",
    3: "a rule is broken",
    4: "threads race for shared memory",
}


_COMPILER = ("g++", "-std=c++17", "-fno-strict-aliasing", "-fPIC", "-w", "-Wno-unknown-pragmas")


@functools.cache
def race_checks() -> bytes:
    """``races.cpp``, compiled: what is called for every access to memory."""
    with tempfile.TemporaryDirectory(prefix="emulated-") as folder:
        target = Path(folder) / "races.o"
        command = (*_COMPILER, "-O2", "-c", "-o", target, HERE / "races.cpp")
        subprocess.run(command, check=True)
        return target.read_bytes()


@functools.cache
def library(variant: cupy_backend.Variant, entry: str) -> ctypes.CDLL:
    code = cupy_backend.kernel_source(variant, folders=(HERE, cupy_backend.source_folder()))
    code = f"""#include "{HERE / "emulator.hpp"}"
{code}
template <typename P> P parameter_of(void (*kernel)(P));
extern "C" int emulate(const void* parameters, int grid, int threads, int shared_bytes, unsigned seed) {{
  const auto& p = *static_cast<const decltype(parameter_of({entry}))*>(parameters);
  return emulator::launch(grid, threads, {variant.blocks}, shared_bytes, seed, [&] {{ {entry}(p); }});
}}
"""
    with tempfile.TemporaryDirectory(prefix="emulated-") as name:
        folder = Path(name)
        (folder / "kernel.cpp").write_text(code)
        (folder / "races.o").write_bytes(race_checks())  # instead of the sanitizer's own library
        command = (*_COMPILER, "-O0", "-fsanitize=thread", "-c", "kernel.cpp")
        subprocess.run(command, check=True, cwd=folder)
        command = ("g++", "-shared", "-o", "kernel.so", "kernel.o", "races.o")
        subprocess.run(command, check=True, cwd=folder)
        return ctypes.CDLL(os.fspath(folder / "kernel.so"))


def starter(
    plan: Plan, dtype: torch.dtype, device: object, seed: int = 0
) -> Callable[[cupy_backend.Packed], None]:
    """What :func:`cupy_backend.starter` does, for tensors in main memory.

    Args:
        seed: of the order in which warps run.

    Raises:
        RuntimeError: when it is called, and the kernel hangs, breaks a rule or accesses shared memory in no
            order with other threads.
    """
    emulate = library(cupy_backend.variant_of(plan, dtype), plan.entry).emulate

    def start(packed: cupy_backend.Packed) -> None:
        address = ctypes.c_void_p(packed.struct.buffer_info()[0])
        status = emulate(address, plan.grid, plan.threads, plan.shared_bytes, ctypes.c_uint(seed))
        if status:
            raise RuntimeError(f"{plan.entry}: {PROBLEMS[status]}")

    return start


def tensor_map(
    dtype: torch.dtype, pointer: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> tuple[int, ...]:
    """A tensor as ``emulator/device.cuh`` reads it; what the driver would refuse is refused."""
    assert len(sizes) == len(box) == len(strides) + 1 == 5
    assert pointer % 16 == 0
    assert all(stride > 0 and stride * dtype.itemsize % 16 == 0 for stride in strides)
    assert all(0 < count <= 256 for count in box)
    assert box[0] * dtype.itemsize % 16 == 0
    return pointer, *sizes, *strides, *box, 0


@contextlib.contextmanager
def emulated(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets ``scan_kernels`` take tensors in main memory; whatever it allocates is NaN at first."""
    caches = (
        *(launches.forward_launch, launches.backward_launch, launches.finish_launch),
        *(local_perception_kernels._convolution, local_perception_kernels._reduction),
        *(ada_layer_norm_kernels._rows, ada_layer_norm_kernels._columns),
    )
    patch.setattr(cupy_backend, "starter", starter)
    patch.setattr(cupy_backend, "bind", lambda device: None)
    patch.setattr(cupy_backend, "processors", lambda device: 2)
    patch.setattr(cupy_backend, "shared_limit", lambda device: SHARED_LIMIT)
    patch.setattr(cupy_backend, "has_barriers", lambda device: True)
    patch.setattr(cupy_backend, "has_accelerator", lambda device: True)
    patch.setattr(cupy_backend, "tensor_map", tensor_map)
    patch.setattr(cupy_backend, "clusters", lambda device: (1, 2))
    patch.setattr(cupy_backend, "current_device", lambda: None)  # the index of the processor
    try:
        with poisoned_memory():
            yield
    finally:
        for each in caches:
            each.cache_clear()
