"""Runs the warp kernels on the processor: g++ compiles them with ``emulator/`` in place of the PTX."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.plans import Plan

HERE = Path(__file__).parent / "emulator"
PROBLEMS = {
    1: "nothing could go on: a deadlock",
    2: "something was sent that nobody waited for",
    3: "a rule is broken",
}


@functools.cache
def library(source: str, dtype: torch.dtype, vec: int, run: int, entry: str) -> ctypes.CDLL:
    code = cupy_backend.kernel_source(source, dtype, vec, run, folders=(HERE, cupy_backend.source_folder()))
    cluster = entry.rsplit("_", 1)[1]
    code = re.sub(rf"^ENTRY\((?!{cluster},).*$", "", code, flags=re.MULTILINE)  # other cluster sizes
    code = f"""#include "{HERE / "emulator.hpp"}"
{code}
extern "C" int emulate(const void* parameters, int grid, int threads, int shared_bytes, unsigned seed) {{
  const Parameters& p = *static_cast<const Parameters*>(parameters);
  return emulator::launch(grid, threads, {cluster}, shared_bytes, seed, [&] {{ {entry}(p); }});
}}
"""
    folder = Path(tempfile.mkdtemp(prefix="emulated-"))
    (folder / "kernel.cpp").write_text(code)
    target = folder / "kernel.so"
    command = [
        "g++",
        "-std=c++17",
        "-O0",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
        "-w",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run([*command, "-o", target, folder / "kernel.cpp"], check=True)
    loaded = ctypes.CDLL(os.fspath(target))
    (folder / "kernel.cpp").unlink()
    target.unlink()
    folder.rmdir()
    return loaded


def launch(
    plan: Plan, dtype: torch.dtype, pointers: Sequence[int], strides: Sequence[int], seed: int = 0
) -> None:
    """What :func:`cupy_backend.launch` does, on tensors in main memory.

    Raises:
        RuntimeError: the kernel hangs or breaks a rule.
    """
    struct = array("q", (*pointers, *plan.parameters, *strides))
    emulate = library(plan.source, dtype, plan.vec, plan.run, plan.entry).emulate
    status = emulate(
        ctypes.c_void_p(struct.buffer_info()[0]),
        plan.grid,
        plan.threads,
        plan.shared_bytes,
        ctypes.c_uint(seed),
    )
    if status:
        raise RuntimeError(f"{plan.entry}: {PROBLEMS[status]}")
