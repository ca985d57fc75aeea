"""The local perception unit on CUDA tensors: launches, autograd function, and operators for tracing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.launches import Launch, Setting
from gspn2_diffusion.ops.plans import Plan, ceil_div
from gspn2_diffusion.ops.scan_kernels import unit_last_stride

COLUMNS, WORKERS = 4, 8  # as in cuda/local_perception.cu
VECTORS = (1, 4)
_THREADS = 256
_ROWS = (16, 8, 4, 2)  # a band of fewer rows reads more of them twice
_FULL = 1024  # threads of a multiprocessor that hide the memory's latency


@functools.lru_cache(maxsize=4096)
def _convolution(
    shape: tuple[int, ...], strides: tuple[int, ...], setting: Setting, vec: int, wide: bool, flip: bool
) -> Launch:
    """The launch of the convolution: addresses of ``x, weight, bias, y``."""
    batch, height, width, channels = shape
    wanted = _FULL * cupy_backend.processors(setting.device)

    def threads(rows: int) -> int:
        return batch * ceil_div(height, rows) * ceil_div(width, COLUMNS) * (channels // vec)

    rows = next((rows for rows in _ROWS if threads(rows) >= wanted), _ROWS[-1])
    plan = Plan(
        source=cupy_backend.LOCAL,
        entry=cupy_backend.LOCAL,
        vec=vec,
        run=1,
        grid=ceil_div(threads(rows), _THREADS),
        threads=_THREADS,
        shared_bytes=0,
        parameters=(*shape, rows, int(flip), int(wide)),
    )
    return Launch(plan, shape, setting, strides)


@functools.lru_cache(maxsize=4096)
def _reduction(
    shape: tuple[int, ...], dy: tuple[int, ...], x: tuple[int, ...], setting: Setting, vec: int
) -> tuple[Launch, int]:
    """The launch of the gradients of weight and bias: addresses of ``dy, x, partial``; and its groups."""
    batch, height, width, channels = shape
    slices, rows = ceil_div(channels // vec, 32), _ROWS[0]
    parts = batch * ceil_div(height, rows) * ceil_div(width, COLUMNS)
    groups = max(1, min(ceil_div(4 * cupy_backend.processors(setting.device), slices), parts // WORKERS))
    plan = Plan(
        source=cupy_backend.LOCAL,
        entry=f"{cupy_backend.LOCAL}_weight",
        vec=vec,
        run=1,
        grid=slices * groups,
        threads=32 * WORKERS,
        shared_bytes=4 * WORKERS * 10 * vec * 32,
        parameters=(*shape, rows, groups),
    )
    return Launch(plan, shape, setting, (*dy, *x)), groups


def _prepared(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors with elements of a channel's neighbours side by side, and the vector that all allow."""
    ready = [unit_last_stride(tensor) for tensor in tensors]
    vec, size = VECTORS[-1], ready[0].element_size()
    fits = all(
        tensor.shape[-1] % vec == 0
        and tensor.data_ptr() % (vec * size) == 0
        and all(stride % vec == 0 for stride in tensor.stride()[:-1])
        for tensor in ready
    )
    return ready, vec if fits else VECTORS[0]


def _setting(tensor: Tensor) -> Setting:
    return Setting(tensor.dtype, tensor.device.index, (), 0, False)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool = False) -> Tensor:
    """``x (B, H, W, C)`` plus its depthwise convolution, contiguous, in one launch on the current stream.

    Args:
        weight: contiguous ``(C, 1, 3, 3)``, of the dtype of ``x`` or float32.
        bias: contiguous ``(C,)`` of the dtype of ``weight``, or None for zeros.
        flip: use the taps the other way round, as the gradient of ``x`` does.
    """
    index = x.device.index
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return convolve(x, weight, bias, flip)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    (x,), vec = _prepared(x)
    cupy_backend.bind(index)
    wide = weight.dtype != x.dtype
    launch = _convolution(tuple(x.shape), x.stride()[:3], _setting(x), vec, wide, flip)
    launch(x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
    return y


def weight_gradients(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(C, 1, 3, 3)`` and ``(C,)`` of weight and bias in float32, summed in a fixed order."""
    index, channels = x.device.index, x.shape[-1]
    if cupy_backend.current_device() != index:
        with torch.cuda.device(index):
            return weight_gradients(dy, x)
    if x.numel() == 0:
        sums = x.new_zeros(channels, 10, dtype=torch.float32)
    else:
        (dy, x), vec = _prepared(dy, x)
        cupy_backend.bind(index)
        launch, groups = _reduction(tuple(x.shape), dy.stride()[:3], x.stride()[:3], _setting(x), vec)
        partial = torch.empty(groups, 10, channels, dtype=torch.float32, device=x.device)
        launch(dy.data_ptr(), x.data_ptr(), partial.data_ptr())
        sums = partial.sum(0).t()
    # The operator's results may not share memory, so the first is copied.
    taps = sums[:, :9].clone(memory_format=torch.contiguous_format)
    return taps.view(channels, 1, 3, 3), sums[:, 9].contiguous()


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``x, weight, bias`` in their dtypes, None where not wanted."""
    dx = convolve(dy, weight, None, flip=True) if wanted[0] else None
    if not (wanted[1] or wanted[2]):
        return dx, None, None
    dweight, dbias = weight_gradients(dy, x)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


class LocalPerception(torch.autograd.Function):
    """``apply(x, weight, bias)``; differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return convolve(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        return gradients(dy, x, weight, bias, ctx.needs_input_grad)


@torch.library.custom_op("gspn2_diffusion::local_perception", mutates_args=(), device_types="cuda")
def local_perception(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return convolve(x, weight, bias)


@local_perception.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "gspn2_diffusion::local_perception_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor bias, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def local_perception_backward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if grad is None else grad for grad in gradients(dy, *arguments))


@local_perception_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    both = wanted[1] or wanted[2]
    kinds = ((x, wanted[0]), (weight, both), (bias, both))
    return tuple(kind.new_empty(kind.shape if want else 0) for kind, want in kinds)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad)
    grads = local_perception_backward(dy, *ctx.saved_tensors, wanted)
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


local_perception.register_autograd(_backward, setup_context=_setup_context)
