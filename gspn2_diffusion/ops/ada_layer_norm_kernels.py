"""Modulated layer norm on CUDA tensors: launches, autograd function, and operators for tracing."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.launches import Launch, Setting
from gspn2_diffusion.ops.plans import Plan, ceil_div

WARPS = 8  # as in cuda/ada_layer_norm.cu
VECTORS = (4, 8)  # the wider one for elements of two bytes
RUNS = (2, 5)  # vectors of a row that a thread has at most
MOST_CHANNELS = WARPS * 32 * RUNS[-1] * VECTORS[0]
_MOST_REPEATED = 8
_FULL = 32  # warps of a multiprocessor that hide the memory's latency
_MOST_ROWS = 2**31  # the kernels divide in 32 bits


def fits(x: Tensor, shift: Tensor, scale: Tensor, out_dtype: torch.dtype) -> bool:
    """Whether the kernels take ``x (B, N, C)`` and ``shift, scale (B or 1, 1, C)``."""
    if out_dtype != x.dtype and not (x.dtype == torch.float32 and out_dtype == torch.bfloat16):
        return False
    if shift.dtype != scale.dtype or shift.dtype not in (x.dtype, torch.float32):
        return False
    channels = x.shape[-1]
    rows = x.shape[0] * x.shape[1]
    return channels % VECTORS[0] == 0 and channels <= MOST_CHANNELS and 0 < rows < _MOST_ROWS


def _vector(channels: int, size: int) -> int:
    """Elements of `size` bytes that one access moves."""
    return VECTORS[size == 2 and channels % VECTORS[1] == 0]


@functools.lru_cache(maxsize=4096)
def _rows(
    entry: str, sizes: tuple[int, ...], strides: tuple[int, ...], setting: Setting, more: int
) -> Launch:
    """A launch with some warps for every row."""
    rows, _, channels, *_ = sizes
    vec = _vector(channels, setting.dtype.itemsize)
    warps = ceil_div(channels // vec, 32 * RUNS[-1])
    run = next(run for run in RUNS if channels // vec <= 32 * warps * run)
    together, repeat, after = WARPS // warps, 1, list[int]()
    if entry == cupy_backend.NORM:  # a row is fetched while the one before it is normalised
        waves = rows * warps // (2 * _FULL * cupy_backend.processors(setting.device))
        repeat = max(1, min(_MOST_REPEATED, waves))
        after = [more, repeat]
    grid = ceil_div(rows, together * repeat)
    plan = _plan(entry, vec, run, grid, 32 * warps * together, 4 * WARPS)
    return Launch(plan, (), setting, (*sizes[:3], warps, *sizes[3:], *strides, *after))


@functools.lru_cache(maxsize=4096)
def _columns(
    batch: int, sizes: tuple[int, ...], strides: tuple[int, ...], setting: Setting
) -> tuple[Launch, int]:
    """The launch that sums over tokens, and its groups."""
    _, tokens, channels, *_ = sizes
    vec = _vector(channels, setting.dtype.itemsize)
    slices = ceil_div(channels // vec, 32)
    wanted = ceil_div(4 * cupy_backend.processors(setting.device), slices * batch)
    groups = max(1, min(wanted, tokens // WARPS))
    entry, shared = f"{cupy_backend.NORM}_modulation", 4 * WARPS * 2 * vec * 32
    plan = _plan(entry, vec, RUNS[0], slices * batch * groups, 32 * WARPS, shared)
    return Launch(plan, (), setting, (*sizes[:3], 0, *sizes[3:], *strides, batch, groups)), groups


def _plan(entry: str, vec: int, run: int, grid: int, threads: int, shared: int) -> Plan:
    return Plan(
        source=cupy_backend.NORM,
        entry=entry,
        vec=vec,
        run=run,
        grid=grid,
        threads=threads,
        shared_bytes=shared,
        parameters=(),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where its rows cannot be read in vectors."""
    size = tensor.element_size()
    vec = _vector(tensor.shape[-1], size)
    right = (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % min(16, vec * size) == 0
        and all(s % vec == 0 for s, n in zip(tensor.stride()[:-1], tensor.shape, strict=False) if n > 1)
    )
    # Not `contiguous`, which returns a tensor that begins between two vectors as it is.
    return tensor if right else tensor.clone(memory_format=torch.contiguous_format)


def _described(x: Tensor, scale: Tensor, narrow: bool) -> tuple[tuple[int, ...], tuple[int, ...], Setting]:
    """Sizes, strides and setting of a launch."""
    batch, tokens, channels = x.shape
    sizes = (batch * tokens, tokens, channels, int(scale.dtype != x.dtype), int(narrow))
    strides = (x.stride(0), x.stride(1), scale.stride(0) if scale.shape[0] > 1 else 0)
    return sizes, strides, Setting(x.dtype, x.device.index, (), 0, False)


def normalise(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``y (B, N, C)`` contiguous and, where they are kept, mean and rstd ``(B, N, 2)``; one launch.

    Args:
        shift, scale: such that :func:`fits`.
    """
    index = x.device.index
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return normalise(x, shift, scale, eps, out_dtype, keep)
    x, (shift, scale) = _aligned(x), _same_strides(shift, scale)
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    stats = torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device) if keep else None
    cupy_backend.bind(index)
    bits = struct.unpack("i", struct.pack("f", eps))[0]
    launch = _rows(cupy_backend.NORM, *_described(x, scale, out_dtype != x.dtype), bits)
    at_stats = 0 if stats is None else stats.data_ptr()
    launch(x.data_ptr(), shift.data_ptr(), scale.data_ptr(), y.data_ptr(), at_stats)
    return y, stats


def _same_strides(shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both such that one stride from picture to picture serves them."""
    shift, scale = _aligned(shift), _aligned(scale)
    if shift.shape[0] == scale.shape[0] and shift.stride(0) == scale.stride(0):
        return shift, scale
    batch = max(shift.shape[0], scale.shape[0])
    return (
        shift.expand(batch, -1, -1).contiguous(),
        scale.expand(batch, -1, -1).contiguous(),
    )


def gradients(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, stats: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x, shift, scale`` in their shapes and dtypes, None where not wanted."""
    index = x.device.index
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return gradients(dy, x, shift, scale, stats, wanted)
    dy, x, factor = _aligned(dy.contiguous()), _aligned(x), _aligned(scale)
    cupy_backend.bind(index)
    described = _described(x, factor, dy.dtype != x.dtype)
    dx = None
    if wanted[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch = _rows(f"{cupy_backend.NORM}_backward", *described, 0)
        launch(dy.data_ptr(), x.data_ptr(), factor.data_ptr(), stats.data_ptr(), dx.data_ptr())
    if not (wanted[1] or wanted[2]):
        return dx, None, None
    batch, _, channels = x.shape
    launch, groups = _columns(batch, *described)
    partial = torch.empty(groups, batch, 2, 1, channels, dtype=torch.float32, device=x.device)
    launch(dy.data_ptr(), x.data_ptr(), stats.data_ptr(), partial.data_ptr())
    sums = partial[0] if groups == 1 else partial.sum(0)  # (B, 2, 1, C)
    if shift.shape == scale.shape:  # together: every launch counts where there are few tokens
        dshift, dscale = _fold(sums, shift).unbind(1)
    else:
        dshift, dscale = (
            _fold(part, like) for part, like in zip(sums.unbind(1), (shift, scale), strict=True)
        )
    return dx, dshift, dscale


def _fold(grad: Tensor, like: Tensor) -> Tensor:
    """A gradient for every picture, summed where all share one modulation, in the dtype of the latter."""
    return (grad.sum(0, keepdim=True) if like.shape[0] < grad.shape[0] else grad).to(like.dtype)


class AdaLayerNorm(torch.autograd.Function):
    """``apply(x, shift, scale, eps, out_dtype)``; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        y, stats = normalise(x, shift, scale, eps, out_dtype, True)
        ctx.save_for_backward(x, shift, scale, stats)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, stats = ctx.saved_tensors
        return *gradients(dy, x, shift, scale, stats, ctx.needs_input_grad), None, None


@torch.library.custom_op(
    "gspn2_diffusion::ada_layer_norm",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType out_dtype) -> (Tensor, Tensor)",
)
def ada_layer_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shift, scale, eps, out_dtype = arguments
    y, stats = normalise(x, shift, scale, eps, out_dtype, True)
    assert stats is not None
    return y, stats


@ada_layer_norm.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(*x.shape[:2], 2, dtype=torch.float32)


@torch.library.custom_op(
    "gspn2_diffusion::ada_layer_norm_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor dy, Tensor x, Tensor shift, Tensor scale, Tensor stats, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
)
def ada_layer_norm_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    dx, *rest = (dy.new_empty(0) if grad is None else grad for grad in gradients(dy, *arguments))
    # An operator's results share no memory.
    return dx, *(grad.clone(memory_format=torch.contiguous_format) for grad in rest)


@ada_layer_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, stats: Tensor, wanted: list[bool]
) -> tuple[Tensor, ...]:
    both = wanted[1] or wanted[2]
    kinds = ((x, wanted[0]), (shift, both), (scale, both))
    return tuple(kind.new_empty(kind.shape if want else 0) for kind, want in kinds)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    wanted = list(ctx.needs_input_grad[:3])
    grads = ada_layer_norm_backward(dy, *ctx.saved_tensors, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None


ada_layer_norm.register_autograd(_backward, setup_context=_setup_context)
