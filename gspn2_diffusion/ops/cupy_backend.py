"""CUDA kernels through CuPy: finds the sources, compiles, caches and launches them.

The only module that imports CuPy, and only when a kernel is needed. Sources are compiled at run time by NVRTC
for the GPU at hand; CuPy keeps the binaries in its disk cache.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNELS = ("line_scan_forward", "line_scan_backward")
_SCALAR = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_THREADS = 512  # __launch_bounds__ of the kernels
_PREFERRED_SHARED_BYTES = 48 * 1024  # more would leave too few blocks on a multiprocessor
_MAX_GRID = 2**31 - 1


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


def kernel_source(name: str, dtype: torch.dtype, vec: int) -> str:
    """The complete source of one kernel variant, headers included, so that it is its own cache key."""
    folder = source_folder()
    body = (folder / f"{name}.cu").read_text()
    header = (folder / "common.cuh").read_text().replace("#pragma once", "")
    preamble = f"#define SCALAR {_SCALAR[dtype]}\n#define VEC {vec}\n"
    line = body[: body.index('#include "common.cuh"')].count("\n") + 2
    included = f'#line 1 "common.cuh"\n{header}\n#line {line} "{name}.cu"'
    return f'{preamble}#line 1 "{name}.cu"\n' + body.replace('#include "common.cuh"', included)


def variants() -> list[tuple[str, torch.dtype, int]]:
    """Every (kernel, dtype, vector width) that can be launched."""
    widths = {dtype: (1, 2, 4) if dtype == torch.float32 else (1, 2, 4, 8) for dtype in _SCALAR}
    return [(name, dtype, vec) for name in KERNELS for dtype in _SCALAR for vec in widths[dtype]]


def compile_all(arch: str | None = None) -> dict[str, float]:
    """Compile every kernel variant.

    Args:
        arch: such as ``"sm_90"``: compiled with NVRTC alone, which needs neither a GPU nor a driver, and
            not kept. None: for the current GPU, into the disk cache.

    Returns:
        Seconds by variant name.

    Raises:
        RuntimeError: a variant does not compile; the message holds the compiler's log.
    """
    seconds = {}
    for name, dtype, vec in variants():
        start = time.perf_counter()
        if arch is None:
            _kernel(torch.cuda.current_device(), name, dtype, vec)
        else:
            compile_cubin(name, dtype, vec, arch)
        seconds[f"{name}[{str(dtype).removeprefix('torch.')}, {vec}]"] = time.perf_counter() - start
    return seconds


def compile_cubin(name: str, dtype: torch.dtype, vec: int, arch: str) -> bytes:
    """One kernel variant as machine code for ``arch`` (``"sm_90"``); needs no GPU.

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's log.
    """
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(kernel_source(name, dtype, vec), f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*_options(), f"--gpu-architecture={arch}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{name} does not compile for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def _options() -> tuple[str, ...]:
    return ("--std=c++17",)


@functools.cache
def _kernel(device: int, name: str, dtype: torch.dtype, vec: int) -> Any:
    """The loaded kernel of one device; CuPy loads a module into the current context only."""
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=kernel_source(name, dtype, vec), options=_options(), backend="nvrtc")
        kernel = module.get_function(name)
        kernel.max_dynamic_shared_size_bytes = _shared_limit(device)
    return kernel


@functools.cache
def _shared_limit(device: int) -> int:
    """Bytes of dynamic shared memory one block may have."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


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

        _kernel(device, KERNELS[0], torch.float32, 1)
        return True, f"CuPy {cupy.__version__} on {torch.cuda.get_device_name(device)}"
    except Exception as error:  # whatever is broken about the installation is the reason to report
        lines = str(error).splitlines()
        return False, f"CuPy cannot run the kernels: {type(error).__name__}: {lines[0] if lines else ''}"


# ---- launch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How one problem is spread over threads and blocks; see ``struct Task`` in ``common.cuh``."""

    vec: int
    lanes_per_group: int
    groups_per_block: int
    channel_slices: int
    group_slices: int
    chunk_size: int
    chunks: int
    grid: int
    threads: int
    shared_bytes: int
    scratch_floats: int  # per block, used instead of shared memory when a line does not fit


def _vector_width(dtype: torch.dtype, per_group: int, tensors: list[tuple[Tensor, int]]) -> int:
    """The widest access, up to 16 bytes, that every tensor's address and strides allow.

    Args:
        per_group: channels of one group; a vector stays inside its group.
        tensors: each with the number of its leading dimensions whose strides the kernel uses.
    """
    vec = 16 // dtype.itemsize
    while vec > 1:
        size = vec * dtype.itemsize
        if per_group % vec == 0 and all(
            t.data_ptr() % size == 0
            and all(s % vec == 0 for s, length in zip(t.stride()[:n], t.shape, strict=False) if length > 1)
            for t, n in tensors
        ):
            break
        vec //= 2
    return vec


def _make_plan(x: Tensor, groups: int, directions: list[int], chunk: int, vec: int, backward: bool) -> _Plan:
    batch, height, width, channels = x.shape
    per_group = channels // groups
    longest_scan = max(height if d < 2 else width for d in directions)
    longest_line = max(width if d < 2 else height for d in directions)
    limit = _shared_limit(x.device.index)
    lanes = min(32, _power_of_two(-(-per_group // vec)))
    group_lanes = min(_power_of_two(groups), 32 // lanes)

    def floats_per_position(lanes: int, group_lanes: int) -> int:
        return 2 * (lanes * group_lanes * vec + (3 * group_lanes if backward else 0))

    while 4 * longest_line * floats_per_position(lanes, group_lanes) > min(limit, _PREFERRED_SHARED_BYTES):
        if group_lanes > 1:
            group_lanes //= 2
        elif lanes > 1:
            lanes //= 2
        else:
            break
    floats = floats_per_position(lanes, group_lanes)
    shared = 4 * longest_line * floats
    fits = shared <= limit
    channel_slices = -(-per_group // (vec * lanes))
    group_slices = -(-groups // group_lanes)
    chunk = min(chunk or longest_scan, longest_scan)
    chunks = -(-longest_scan // chunk)
    grid = channel_slices * group_slices * chunks * len(directions) * batch
    if grid > _MAX_GRID:
        raise ValueError(
            f"x of shape {tuple(x.shape)} needs {grid} blocks, more than the {_MAX_GRID} of a launch"
        )
    per_position = lanes * group_lanes
    return _Plan(
        vec=vec,
        lanes_per_group=lanes,
        groups_per_block=group_lanes,
        channel_slices=channel_slices,
        group_slices=group_slices,
        chunk_size=chunk,
        chunks=chunks,
        grid=grid,
        threads=per_position * min(longest_line, _MAX_THREADS // per_position),
        shared_bytes=shared if fits else 0,
        scratch_floats=0 if fits else max(height, width) * floats,
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _shape_arguments(x: Tensor, groups: int, directions: list[int], plan: _Plan) -> tuple[int, ...]:
    packed = sum(code << (2 * slot) for slot, code in enumerate(directions))
    return (
        *x.shape,
        groups,
        len(directions),
        packed,
        plan.chunk_size,
        plan.chunks,
        plan.lanes_per_group,
        plan.groups_per_block,
        plan.channel_slices,
        plan.group_slices,
    )


class _TorchStream:
    """A torch stream as CuPy takes it (the CUDA stream protocol)."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._pointer)


def _launch(name: str, dtype: torch.dtype, device: int, plan: _Plan, arguments: tuple[int, ...]) -> None:
    import cupy

    kernel = _kernel(device, name, dtype, plan.vec)
    stream = torch.cuda.current_stream(device).cuda_stream
    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_TorchStream(stream)):
        kernel((plan.grid,), (plan.threads,), arguments, shared_mem=plan.shared_bytes)


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _scratch(plan: _Plan, device: torch.device) -> Tensor | None:
    floats = plan.scratch_floats * plan.grid
    return torch.empty(floats, dtype=torch.float32, device=device) if floats else None


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def line_scan_forward(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
    save_state: bool,
) -> tuple[Tensor, Tensor]:
    """One launch of the forward kernel on torch's current stream.

    Args:
        directions: indices into ``("down", "up", "right", "left")``.
        chunk_size: 0 for none.
        save_state: keep the hidden states for the backward pass. Without ``u`` they are ``y`` itself.

    Returns:
        ``y (B, H, W, D, C)``, and the hidden states of the same shape, or an empty tensor if none are kept
        apart from ``y``.
    """
    batch, height, width, channels = x.shape
    y = x.new_empty(batch, height, width, len(directions), channels)
    state = torch.empty_like(y) if save_state and u is not None else x.new_empty(0)
    if y.numel() == 0:
        return y, state
    x, weight, lam = _unit_last_stride(x), _unit_last_stride(weight), _unit_last_stride(lam)
    u = None if u is None else _unit_last_stride(u)
    gates = [(lam, 4)] if u is None else [(lam, 4), (u, 4)]
    groups = weight.shape[4]
    vec = _vector_width(x.dtype, channels // groups, [(x, 3), *gates])
    plan = _make_plan(x, groups, directions, chunk_size, vec, backward=False)
    scratch = _scratch(plan, x.device)
    arguments = (
        *(_pointer(t) for t in (x, weight, lam, u, y)),
        _pointer(state) if state.numel() else 0,
        _pointer(scratch),
        int(normalize),
        *_shape_arguments(x, groups, directions, plan),
        *x.stride()[:3],
        *weight.stride()[:5],
        *lam.stride()[:4],
        *((0, 0, 0, 0) if u is None else u.stride()[:4]),
    )
    _launch("line_scan_forward", x.dtype, x.device.index, plan, arguments)
    return y, state


def line_scan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    state: Tensor,
    directions: list[int],
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch of the backward kernel, and two sums of partial results beside it.

    Args:
        dy: ``(B, H, W, D, C)`` gradient of ``y``.
        state: the hidden states that :func:`line_scan_forward` kept.

    Returns:
        Gradients of ``x, weight, lam, u``, contiguous, in the inputs' dtype (that of ``u`` is empty without
        ``u``).
    """
    batch, height, width, channels = x.shape
    dlam = x.new_empty(batch, height, width, len(directions), channels)
    du = x.new_empty(0) if u is None else torch.empty_like(dlam)
    groups = weight.shape[4]
    if dlam.numel() == 0:
        return torch.zeros_like(x), x.new_zeros(weight.shape), dlam, du
    dy, x, weight, lam = (_unit_last_stride(t) for t in (dy, x, weight, lam))
    u = None if u is None else _unit_last_stride(u)
    gates = [(lam, 4), (dy, 4)] if u is None else [(lam, 4), (dy, 4), (u, 4)]
    vec = _vector_width(x.dtype, channels // groups, [(x, 3), (state, 4), *gates])
    plan = _make_plan(x, groups, directions, chunk_size, vec, backward=True)
    scratch = _scratch(plan, x.device)
    dx = torch.empty(len(directions), *x.shape, dtype=torch.float32, device=x.device)
    dweight = torch.empty(plan.channel_slices, *weight.shape, dtype=torch.float32, device=x.device)
    arguments = (
        *(_pointer(t) for t in (dy, x, weight, lam, u, state, dx, dweight, dlam)),
        _pointer(du) if du.numel() else 0,
        _pointer(scratch),
        int(normalize),
        *_shape_arguments(x, groups, directions, plan),
        *dy.stride()[:4],
        *x.stride()[:3],
        *weight.stride()[:5],
        *lam.stride()[:4],
        *((0, 0, 0, 0) if u is None else u.stride()[:4]),
    )
    _launch("line_scan_backward", x.dtype, x.device.index, plan, arguments)
    return dx.sum(0).to(x.dtype), dweight.sum(0).to(x.dtype), dlam, du
