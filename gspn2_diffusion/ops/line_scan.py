"""The public operator: argument checks, choice of backend, autograd and torch.compile registration."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend, scan_kernels
from gspn2_diffusion.ops.launches import Launch, describe
from gspn2_diffusion.ops.reference import line_scan_reference
from gspn2_diffusion.ops.torch_library import LineScan, line_scan_forward

logger = logging.getLogger(__name__)

DIRECTIONS = ("down", "up", "right", "left")
BACKENDS = ("auto", "cupy", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REFERENCE_DTYPES = (*_KERNEL_DTYPES, torch.float64)
_EAGER_TYPES = (Tensor, torch.nn.Parameter)


def line_scan(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk_size: int | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""GSPN-2's line scan over a picture, in up to four directions at once (arXiv 2512.07884, section 3).

    For each direction, with lines ``i`` in the order in which it visits them and positions ``p`` on a line::

        h[i, p] = sum over k of W[i, p, k] * h[i-1, p+k-1] + lam[i, p] * x[i, p]        (h[-1] = 0)
        y[i, p] = u[i, p] * h[i, p]

    "down" visits the rows from first to last, "up" from last to first, "right" the columns from first to
    last, "left" from last to first. Results are stored at the picture's own positions.

    Args:
        x: ``(B, H, W, C)`` input, shared by the directions.
        weight: ``(B, H, W, D, G, 3)`` raw coefficients for the neighbours ``p-1, p, p+1`` on the previous
            line. ``C % G == 0``; channel ``c`` uses group ``c // (C // G)``: ``G=1`` is GSPN-2, ``G=C``
            GSPN-1.
        lam: ``(B, H, W, D, C)`` input gate.
        u: ``(B, H, W, D, C)`` output gate, or None for 1.
        directions: which scans, each at most once; ``D = len(directions)``.
        chunk_size: the hidden state restarts after so many lines, counted from where the scan starts;
            None for never (GSPN-local otherwise).
        normalize: True applies a sigmoid and divides by the sum over the neighbours that exist, so that
            every row of ``W`` sums to 1. False uses ``weight`` as given; missing neighbours count as zero.
        backend: "cupy" (CUDA kernels), "reference" (plain torch, any device) or "auto" (CuPy for CUDA
            tensors where it works, else the reference; says once which).

    All tensors share one device and one dtype: float32, bfloat16 or float16, accumulated in float32
    (float64 with the reference). Any memory layout whose last dimension has stride 1 is used in place; any
    other is copied first. Under autocast the inputs are cast to autocast's dtype. Differentiable once in all
    four tensors (the reference: any number of times).

    Returns:
        ``y (B, H, W, D, C)`` of ``x``'s dtype. The kernels lay its dimensions out in the order of those of
        ``lam``: with fewer than 16 channels, a tensor made as ``(D, B, H, W, C)`` and permuted is read and
        written in longer runs.

    Raises:
        TypeError: an argument is of the wrong type or of an unsupported dtype.
        ValueError: shapes, devices or options do not fit together.
        RuntimeError: ``backend="cupy"`` cannot run here.
    """
    eager = not torch.compiler.is_compiling() and backend != "reference"
    launch = None
    if eager and not torch.is_autocast_enabled():  # for CUDA; its name would have to be parsed
        launch = _known(x, weight, lam, u, directions, chunk_size, normalize, backend)
    if launch is None and torch.is_autocast_enabled(device_type := _check_tensors(x, weight, lam, u)):
        x, weight, lam, u = _cast(device_type, x, weight, lam, u)
        if eager:
            launch = _known(x, weight, lam, u, directions, chunk_size, normalize, backend)
    if launch is not None:
        return _run(launch, x, weight, lam, u)
    codes = _check(x, weight, lam, u, directions, chunk_size, backend)
    if choose_backend(backend, x) == "reference":
        return line_scan_reference(x, weight, lam, u, directions, chunk_size, normalize)
    chunk, normalize = chunk_size or 0, bool(normalize)
    if torch.compiler.is_compiling() or type(x) not in _EAGER_TYPES or x.numel() == 0:
        save_state = _needs_gradient(x, weight, lam, u)  # traced, faked, wrapped, or nothing to do
        return line_scan_forward(x, weight, lam, u, codes, chunk, normalize, save_state)[0]
    x, weight, lam = (scan_kernels.unit_last_stride(t) for t in (x, weight, lam))
    u = None if u is None else scan_kernels.unit_last_stride(u)
    call = describe(x, weight, lam, u, tuple(codes), chunk, normalize)
    if len(_kept) >= _MOST_KEPT:
        _kept.clear()
    launch = scan_kernels.kept_launch(call)
    _kept[_key(x, weight, lam, u, tuple(directions), chunk_size, normalize, backend)] = launch
    return _run(launch, x, weight, lam, u)


# Launches by all that a call depends on but the addresses: what was found right once is looked up instead of
# checked. By backend, too, since "auto" has to say what it chose.
_kept: dict[tuple[Any, ...], Launch] = {}
_MOST_KEPT = 4096


def _key(x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None, *options: Any) -> tuple[Any, ...]:
    """What a call is known by; flat, since every tuple inside of another costs the host time."""
    addresses, gate = x.data_ptr() | lam.data_ptr(), None
    if u is not None:
        addresses |= u.data_ptr()
        gate = (u.shape, u.stride(), u.dtype, u.get_device())
    return (
        options,
        addresses & 15,
        weight.data_ptr() & 15,
        x.shape,
        x.stride(),
        x.dtype,
        x.get_device(),
        weight.shape,
        weight.stride(),
        weight.dtype,
        weight.get_device(),
        lam.shape,
        lam.stride(),
        lam.dtype,
        lam.get_device(),
        gate,
    )


def _known(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: Any,
    chunk_size: Any,
    normalize: Any,
    backend: Any,
) -> Launch | None:
    """What is kept for a call, or None for one that is new, none of its business or to be found wrong."""
    if not (
        type(x) in _EAGER_TYPES
        and type(weight) in _EAGER_TYPES
        and type(lam) in _EAGER_TYPES
        and (u is None or type(u) in _EAGER_TYPES)
        and (chunk_size is None or type(chunk_size) is int)  # 1.0 and True would be taken for 1
        and type(normalize) is bool
        and x.is_cuda
    ):
        return None
    try:
        return _kept.get(_key(x, weight, lam, u, directions, chunk_size, normalize, backend))
    except TypeError:  # a list of directions, and what is none
        return None


def _needs_gradient(x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or lam.requires_grad or (u is not None and u.requires_grad)
    )


def _run(launch: Launch, x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None) -> Tensor:
    if _needs_gradient(x, weight, lam, u):
        return LineScan.apply(launch, x, weight, lam, u)  # type: ignore[no-any-return,no-untyped-call]
    return scan_kernels.run_forward(launch, x, weight, lam, u, False)[0]


def choose_backend(backend: str, x: Tensor) -> str:
    """Which backend serves an operator on ``x``; raises where "cupy" cannot be honoured."""
    if backend == "reference":
        return "reference"
    if backend == "cupy":
        if x.device.type != "cuda":
            raise ValueError(f"backend='cupy' needs tensors on a CUDA device, got device {str(x.device)!r}")
        if x.dtype not in _KERNEL_DTYPES:
            raise TypeError(f"backend='cupy' takes float32, bfloat16 or float16, got {x.dtype}")
        usable, reason = cupy_backend.availability()
        if not usable:
            raise RuntimeError(f"backend='cupy' cannot run: {reason}")
        return "cupy"
    if torch.compiler.is_compiling():
        return _auto_choice.__wrapped__(x.device, x.dtype)[0]
    choice, why = _auto_choice(x.device, x.dtype)
    _announce(choice, why)
    return choice


@functools.lru_cache(maxsize=256)
def _auto_choice(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    if device.type != "cuda":
        return "reference", f"the tensors are on device type {device.type!r}"
    if dtype not in _KERNEL_DTYPES:
        return "reference", f"the kernels do not take {dtype}"
    usable, reason = cupy_backend.availability()
    return ("cupy", reason) if usable else ("reference", reason)


_announced: set[tuple[str, str]] = set()


@torch.compiler.disable
def _log_choice(choice: str, why: str) -> None:
    level = logging.WARNING if choice == "reference" and torch.cuda.is_available() else logging.INFO
    logger.log(level, "line_scan backend: %s (%s)", choice, why)


def _announce(choice: str, why: str) -> None:
    if (choice, why) in _announced:
        return
    _announced.add((choice, why))
    _log_choice(choice, why)


def _check_tensors(x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None) -> str:
    """The type of the device of ``x``, once all are found to be tensors."""
    if not (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and isinstance(lam, Tensor)
        and (u is None or isinstance(u, Tensor))
    ):
        for name, tensor in (("x", x), ("weight", weight), ("lam", lam), ("u", u)):
            if not isinstance(tensor, Tensor) and not (name == "u" and tensor is None):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    return x.device.type


def _cast(
    device_type: str, x: Tensor, weight: Tensor, lam: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype; float64 stays what it is."""
    if x.dtype == torch.float64:
        return x, weight, lam, u
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), lam.to(dtype), None if u is None else u.to(dtype)


def _check(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: Sequence[str],
    chunk_size: int | None,
    backend: str,
) -> list[int]:
    """The directions' codes, once everything is found right."""
    if not isinstance(directions, (tuple, list)) or not all(isinstance(name, str) for name in directions):
        _check_directions(directions)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size must be None or an integer >= 1, got {chunk_size!r}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    _check_directions(directions)
    _check_shapes(x.shape, weight.shape, lam.shape, None if u is None else u.shape, len(directions))
    if x.dtype not in _REFERENCE_DTYPES:
        raise TypeError(
            f"x has dtype {x.dtype}; supported are float32, bfloat16, float16 (and float64, reference)"
        )
    for name, tensor in (("weight", weight), ("lam", lam), ("u", x if u is None else u)):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}; use one device")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, but x has {x.dtype}; use one dtype")
    return [DIRECTIONS.index(name) for name in directions]


def _check_directions(directions: Sequence[str]) -> None:
    allowed = isinstance(directions, (tuple, list)) and all(name in DIRECTIONS for name in directions)
    if not allowed or not directions or len(set(directions)) != len(directions):
        raise ValueError(f"directions must name some of {DIRECTIONS}, each once, got {directions!r}")


def _check_shapes(
    x: torch.Size, weight: torch.Size, lam: torch.Size, u: torch.Size | None, count: int
) -> None:
    if len(x) != 4:
        raise ValueError(f"x must have shape (B, H, W, C), got {tuple(x)}")
    batch, height, width, channels = x
    if min(height, width, channels) < 1:
        raise ValueError(f"x must have H, W and C of at least 1, got {tuple(x)}")
    gate = (batch, height, width, count, channels)
    for name, shape in (("lam", lam), ("u", u)):
        if shape is not None and tuple(shape) != gate:
            raise ValueError(f"{name} must have shape (B, H, W, D, C) = {gate}, got {tuple(shape)}")
    if len(weight) != 6 or tuple(weight[:4]) != gate[:4] or weight[5] != 3:
        expected = (*gate[:4], "G", 3)
        raise ValueError(f"weight must have shape (B, H, W, D, G, 3) = {expected}, got {tuple(weight)}")
    if weight[4] < 1 or channels % weight[4]:
        raise ValueError(f"weight has G = {weight[4]} groups, which must divide the {channels} channels of x")
