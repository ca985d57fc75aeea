"""CUDA kernels through CuPy: finds the sources, compiles, caches and launches them.

The only module that imports CuPy, and only when a kernel is needed. Sources are compiled at run time by NVRTC
for the GPU at hand; CuPy keeps the binaries in its disk cache.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gspn2_diffusion.ops.plane_plans import CLUSTERS as PLANE_CLUSTERS
from gspn2_diffusion.ops.plane_plans import RUN as PLANE_RUN
from gspn2_diffusion.ops.plans import RUNS, Plan

GENERIC = ("line_scan_forward", "line_scan_backward")
TILED = ("line_scan_forward_tiled", "line_scan_backward_tiled")
PLANE = ("line_scan_forward_plane", "line_scan_backward_plane")
FINISH = "line_scan_finish"
LOCAL = "local_perception"
NORM = "ada_layer_norm"
CLUSTERS = (1, 2, 3, 4, 5, 7, 8, 16)
_NON_PORTABLE_CLUSTER = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_SCALAR = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# ---- sources and compilation --------------------------------------------------------------------


def source_folder() -> Path:
    """Where the ``.cu`` files are: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: they are in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda", package.parent / "cuda"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(f"the CUDA sources are missing: no common.cuh in {package / 'cuda'}")


class Variant(NamedTuple):
    """What is compiled by itself: a kernel for one of the ways to launch it, so that its first use is quick.

    Attributes:
        name: of the source file.
        vec, run: channels and positions of a thread.
        blocks: of a cluster.
    """

    name: str
    dtype: torch.dtype
    vec: int
    run: int = 1
    blocks: int = 1

    def __str__(self) -> str:
        shared = f", {self.blocks} blocks" if self.name in (*TILED, *PLANE) else ""
        return f"{self.name}[{str(self.dtype).removeprefix('torch.')}, {self.vec}x{self.run}{shared}]"


def kernel_source(variant: Variant, folders: Sequence[Path] | None = None) -> str:
    """The complete source of a kernel variant, headers included, so that it is its own cache key.

    Args:
        folders: where files are looked for, in this order, instead of in :func:`source_folder`.
    """
    values = {
        "SCALAR": _SCALAR[variant.dtype],
        "VEC": variant.vec,
        "RUN": variant.run,
        "BLOCKS": variant.blocks,
    }
    preamble = "".join(f"#define {name} {value}\n" for name, value in values.items())
    return preamble + _whole(variant.name, tuple(folders or (source_folder(),)))


@functools.cache  # many variants have one source
def _whole(name: str, folders: tuple[Path, ...]) -> str:
    return _include(f"{name}.cu", set(), folders)


def _include(name: str, done: set[str], folders: Sequence[Path]) -> str:
    """A source file with its headers in place of their ``#include`` lines, each once."""
    done.add(name)
    lines = [f'#line 1 "{name}"']
    path = next(folder / name for folder in folders if (folder / name).is_file())
    for number, line in enumerate(path.read_text().splitlines(), 1):
        header = re.fullmatch(r'#include "(\w+\.cuh?)"', line)
        if header is None:
            lines.append("" if line == "#pragma once" else line)
        elif header[1] not in done:
            lines += [_include(header[1], done, folders), f'#line {number + 1} "{name}"']
    return "\n".join(lines)


def variants(sizes: Sequence[int] = CLUSTERS) -> list[Variant]:
    """Every variant that can be launched where clusters have these sizes."""
    found: list[tuple[Any, ...]] = []
    for dtype in _SCALAR:
        chunk = 16 // dtype.itemsize
        found += [(name, dtype, 1 << n, 1) for name in GENERIC for n in range(chunk.bit_length())]
        for name, (vec, run) in itertools.product(TILED, RUNS):
            found += [(name, dtype, vec * 2 // dtype.itemsize, run, blocks) for blocks in sizes]
        for name in PLANE:
            found += [(name, dtype, PLANE_RUN, PLANE_RUN, n) for n in PLANE_CLUSTERS if n in sizes]
        found += [(FINISH, dtype, chunk, 1)]
        found += [(LOCAL, dtype, vec, 1) for vec in (1, 4)]
        found += [(NORM, dtype, vec, run) for vec in (4, chunk)[: 3 - dtype.itemsize // 2] for run in (2, 5)]
    return [Variant(*each) for each in found]


def cluster_sizes(arch: str) -> tuple[int, ...]:
    """Those that GPUs of an architecture (``"sm_90"``) have."""
    return CLUSTERS if int(re.findall(r"\d+", arch)[0]) >= 90 else (1,)


def compile_all(arch: str | None = None) -> dict[str, float]:
    """Compile every kernel variant, several at a time.

    Args:
        arch: such as ``"sm_90"``: compiled with NVRTC alone, which needs neither a GPU nor a driver, and
            not kept. None: for the current GPU, into the disk cache.

    Returns:
        Seconds by variant name.

    Raises:
        RuntimeError: a variant does not compile; the message holds the compiler's log.
    """
    device = torch.cuda.current_device() if arch is None else -1

    def build(variant: Variant) -> tuple[str, float]:
        start = time.perf_counter()
        if arch is None:
            _module(device, variant)
        else:
            compile_cubin(variant, arch)
        return str(variant), time.perf_counter() - start

    sizes = clusters(device) if arch is None else cluster_sizes(arch)
    # Those that take longest first, so that none of them is left for the end.
    longest_first = sorted(variants(sizes), key=lambda variant: variant.name not in PLANE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(build, longest_first))


def compile_cubin(variant: Variant, arch: str) -> bytes:
    """One kernel variant as machine code for ``arch`` (``"sm_90"``); needs no GPU.

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(kernel_source(variant), f"{variant.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*_options(), f"--gpu-architecture={arch}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{variant} does not compile for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _options() -> tuple[str, ...]:
    return ("--std=c++17",)


@functools.cache
def _module(device: int, variant: Variant) -> Any:
    """A compiled source of one device; CuPy loads a module into the current context only."""
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=kernel_source(variant), options=_options(), backend="nvrtc")
        module.compile()
    return module


@functools.cache
def _kernel(device: int, entry: str, variant: Variant) -> Any:
    import cupy
    from cupy_backends.cuda.api import driver

    with cupy.cuda.Device(device):
        kernel = _module(device, variant).get_function(entry)
        kernel.max_dynamic_shared_size_bytes = shared_limit(device)
        if variant.blocks == 16:  # more than the 8 blocks that every GPU with clusters allows
            driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_CLUSTER, 1)
    return kernel


@functools.cache
def shared_limit(device: int) -> int:
    """Bytes of dynamic shared memory one block may have."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


@functools.cache
def processors(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def has_accelerator(device: int) -> bool:
    """Whether a device has the tensor memory accelerator and thread-block clusters."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def has_barriers(device: int) -> bool:
    """Whether a device has asynchronous copies and barriers in shared memory."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def clusters(device: int) -> tuple[int, ...]:
    """Cluster sizes that the tiled kernels may use on a device."""
    return CLUSTERS if has_accelerator(device) else (1,)


# ---- availability -------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def availability() -> tuple[bool, str]:
    """Whether the kernels can run on the current GPU, and why (not); tried once for each device."""
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    return _try_device(torch.cuda.current_device())


@functools.cache
def _try_device(device: int) -> tuple[bool, str]:
    try:
        import cupy

        _kernel(device, GENERIC[0], Variant(GENERIC[0], torch.float32, 1))
        return True, f"CuPy {cupy.__version__} on {torch.cuda.get_device_name(device)}"
    except Exception as error:  # whatever is broken about the installation is the reason to report
        lines = str(error).splitlines()
        return False, f"CuPy cannot run the kernels: {type(error).__name__}: {lines[0] if lines else ''}"


# ---- tensor maps --------------------------------------------------------------------------------

_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
PROMOTION = 0  # CUtensorMapL2promotion: none, 64, 128 or 256 bytes


@functools.cache
def _encode_tensor_map() -> Any:
    """The driver's ``cuTensorMapEncodeTiled``, which CuPy does not bind."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    return library.cuTensorMapEncodeTiled


def tensor_map(
    dtype: torch.dtype, pointer: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
) -> tuple[int, ...]:
    """A tensor for the tensor memory accelerator, as the 16 words of a ``CUtensorMap``.

    Args:
        sizes: elements of each dimension, innermost first.
        strides: in elements, of every dimension but the innermost, which is contiguous.
        box: elements of what one copy takes, zeros where it reaches outside.

    Raises:
        RuntimeError: the driver refuses.
    """
    rank = len(sizes)
    words = (ctypes.c_int64 * 24)()
    offset = -ctypes.addressof(words) % 64 // 8
    status = _encode_tensor_map()(
        ctypes.c_void_p(ctypes.addressof(words) + 8 * offset),
        ctypes.c_int(_MAP_TYPES[dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * dtype.itemsize for stride in strides)),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        *(ctypes.c_int(value) for value in (0, 0, PROMOTION, 0)),  # not interleaved, not swizzled, zero fill
    )
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with status {status} for sizes {tuple(sizes)}")
    return tuple(words[offset : offset + 16])


# ---- launch -------------------------------------------------------------------------------------


@functools.cache
def _set_device() -> Callable[[int], None]:
    from cupy_backends.cuda.api import runtime

    return runtime.setDevice  # type: ignore[no-any-return]


def bind(device: int) -> None:
    """Make a device's context the calling thread's own, which launches and tensor maps need.

    torch remembers which device is current and may not have told the driver in a thread that is new, such as
    that of the backward pass.
    """
    _set_device()(device)


class Packed:
    """A kernel's argument, one struct of 64-bit members; a launch copies it, so it serves many."""

    def __init__(self, struct: array[int]) -> None:
        self.struct = struct
        self._addresses = array("Q", (struct.buffer_info()[0],))
        self.arguments, _ = self._addresses.buffer_info()  # where the driver finds the argument's address


def _stream_of(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


# The handle of torch's current stream on a device, and the device that is current. Private, but the public
# calls make an object each time and look whether CUDA has started, as it has where there are tensors.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_of)
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def variant_of(plan: Plan, dtype: torch.dtype) -> Variant:
    """What has to be compiled for a plan."""
    return Variant(plan.source, dtype, plan.vec, plan.run, plan.blocks)


def starter(plan: Plan, dtype: torch.dtype, device: int) -> Callable[[Packed], None]:
    """What launches a plan on the current device, which is ``device``, and torch's current stream.

    CuPy's own call would convert every argument and switch device and stream each time, so the driver is
    called through CuPy's binding instead.
    """
    from cupy_backends.cuda.api import driver

    function = _kernel(device, plan.entry, variant_of(plan, dtype)).kernel.ptr
    sizes = (plan.grid, 1, 1, plan.threads, 1, 1, plan.shared_bytes)
    launch = driver.launchKernel

    def start(packed: Packed) -> None:
        launch(function, *sizes, current_stream(device), packed.arguments, 0)

    return start
