"""The line scan on CUDA tensors: chooses a plan, allocates the outputs, launches the kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.plans import MAX_BOX, Plan, Problem, choose_tile, generic_plan, tiled_plan


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size,
    groups: int,
    dtype: torch.dtype,
    device: int,
    directions: tuple[int, ...],
    chunk: int,
    normalize: bool,
    backward: bool,
    layouts: tuple[tuple[tuple[int, ...], int] | None, ...],
) -> Plan:
    """The launch for a problem and its tensors' layouts: tiled where 16-byte vectors allow, else generic.

    Args:
        layouts: of each tensor that is read in vectors: strides of all dimensions but the last, which has
            stride 1, and the address modulo 16.
    """
    batch, height, width, channels = shape
    problem = Problem(batch, height, width, channels, groups, directions, chunk, dtype.itemsize, backward)
    vec = _vector_width(problem, layouts)
    limit = cupy_backend.shared_limit(device)
    # The accelerator does not take a stride of zero, as an expanded tensor has.
    sizes = (problem.batch, problem.height, problem.width, len(directions))
    dense = all(
        stride > 0 or size == 1
        for strides, _ in filter(None, layouts)
        for stride, size in zip(strides, sizes, strict=False)
    )
    if vec * problem.itemsize == 16 and dense:
        tile = choose_tile(problem, cupy_backend.clusters(device), limit, cupy_backend.processors(device))
        plan = None if tile is None else tiled_plan(problem, tile, normalize, limit)
        if plan is not None:
            return plan
    return generic_plan(problem, vec, limit)


def _vector_width(problem: Problem, layouts: Sequence[tuple[tuple[int, ...], int] | None]) -> int:
    """Elements of the widest access, up to 16 bytes, that every tensor's address and strides allow."""
    sizes = (problem.batch, problem.height, problem.width, len(problem.directions))
    vec = 16 // problem.itemsize
    while vec > 1:
        fits = problem.per_group % vec == 0 and all(
            address % (vec * problem.itemsize) == 0
            and all(stride % vec == 0 or size == 1 for stride, size in zip(strides, sizes, strict=False))
            for strides, address in filter(None, layouts)
        )
        if fits:
            break
        vec //= 2
    return vec


def _layout(tensor: Tensor | None) -> tuple[tuple[int, ...], int] | None:
    return None if tensor is None else (tensor.stride()[:-1], tensor.data_ptr() % 16)


def unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where the last dimension's elements do not lie side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _extra(plan: Plan, x: Tensor, normalize: bool) -> tuple[tuple[int, ...], Tensor | None]:
    """What generic kernels take between pointers and shape: the scratch buffer and the normalisation."""
    if plan.source not in cupy_backend.GENERIC:
        return (), None
    floats = plan.scratch_floats
    scratch = torch.empty(floats, dtype=torch.float32, device=x.device) if floats else None
    return (_pointer(scratch), int(normalize)), scratch


# Positions of a tile that a copy takes beside its own.
_HALO, _OWN, _AROUND, _STORE = range(4)  # stored are single lines


@functools.lru_cache(maxsize=1024)
def _maps(
    dtype: torch.dtype,
    plan: Plan,
    shape: tuple[int, int, int, int],
    tensors: tuple[tuple[int, int, tuple[int, ...]], ...],
) -> tuple[int, ...]:
    """Tensor maps of a tiled launch, for the vertical and the horizontal directions.

    Args:
        shape: ``(B, H, W, C)``.
        tensors: of each: address, which positions are copied, and the strides of ``B, H, W`` and, where it
            has one, ``D``. The caching allocator hands out the same addresses again and again, so the maps
            are kept.
    """
    tile = plan.tile
    assert tile is not None
    batch, height, width, channels = shape
    directions = plan.parameters[5]
    words: list[int] = []
    for pointer, kind, (s_b, s_h, s_w, *s_d) in tensors:
        for (positions, s_p), (lines, s_l), own in (
            ((width, s_w), (height, s_h), plan.widths[0]),
            ((height, s_h), (width, s_w), plan.widths[1]),
        ):
            count = own + (2 * tile.halo if kind == _HALO else 2 if kind == _AROUND else 0)
            sizes = (channels, positions, lines, directions if s_d else 1, batch)
            strides = [
                s if n > 1 else 16 for s, n in zip((s_p, s_l, *(s_d or [0]), s_b), sizes[1:], strict=True)
            ]
            lines_of_box = 1 if kind == _STORE else tile.stage_lines
            box = (tile.slice, -(-count // plan.boxes), lines_of_box, 1, 1)
            if pointer and 0 < box[1] <= MAX_BOX:
                words += cupy_backend.tensor_map(dtype, pointer, sizes, strides, box)
            else:
                words += [0] * 16
    return tuple(words)


def _map_words(plan: Plan, x: Tensor, tensors: Sequence[tuple[Tensor | None, int]]) -> tuple[int, ...]:
    """:func:`_maps` of tensors, or the same number of zeros where the GPU has no accelerator."""
    if plan.tile is None:
        return ()
    if not cupy_backend.has_accelerator(x.device.index):
        return (0,) * (32 * len(tensors))
    described = tuple(
        (0, kind, (0, 0, 0)) if t is None else (t.data_ptr(), kind, t.stride()[:-1]) for t, kind in tensors
    )
    return _maps(x.dtype, plan, tuple(x.shape), described)


def line_scan_forward(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: Sequence[int],
    chunk_size: int,
    normalize: bool,
    save_state: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One launch of a forward kernel on torch's current stream.

    Args:
        directions: indices into ``("down", "up", "right", "left")``.
        chunk_size: 0 for none.
        save_state: keep the hidden states for the backward pass. Without ``u`` they are ``y`` itself.
        plan: instead of the one that is chosen by shape, for measurements.

    Returns:
        ``y (B, H, W, D, C)`` with its dimensions in memory in the order of those of ``lam``, and the hidden
        states laid out alike or None if none are kept apart from ``y``.
    """
    index = x.device.index
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return line_scan_forward(x, weight, lam, u, directions, chunk_size, normalize, save_state, plan)
    cupy_backend.bind(index)
    x, weight, lam = unit_last_stride(x), unit_last_stride(weight), unit_last_stride(lam)
    y = torch.empty_like(lam)
    state = torch.empty_like(y) if save_state and u is not None else None
    if y.numel() == 0:
        return y, state
    u = None if u is None else unit_last_stride(u)
    groups = weight.shape[4]
    if plan is None:
        layouts = (_layout(x), _layout(lam), _layout(u))
        setting = (x.dtype, x.device.index, tuple(directions), chunk_size, normalize)
        plan = _plan(x.shape, groups, *setting, False, layouts)
    extra, _scratch = _extra(plan, x, normalize)
    pointers = (*map(_pointer, (x, weight, lam, u, y, state)), *extra)
    gate_strides = (0, 0, 0, 0) if u is None else u.stride()[:4]
    strides = (*x.stride()[:3], *weight.stride()[:5], *lam.stride()[:4], *gate_strides, *y.stride()[:4])
    maps = _map_words(plan, x, ((x, _HALO), (lam, _HALO), (u, _OWN), (y, _STORE), (state, _STORE)))
    cupy_backend.launch(plan, x.dtype, x.device.index, pointers, strides, maps)
    return y, state


def line_scan_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    state: Tensor,
    directions: Sequence[int],
    chunk_size: int,
    normalize: bool,
    wanted: Sequence[bool] = (True, True, True, True),
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """One launch of a backward kernel, and the sums of its partial results.

    Args:
        dy: ``(B, H, W, D, C)`` gradient of ``y``.
        state: the hidden states that :func:`line_scan_forward` kept.
        wanted: which gradients of ``x, weight, lam, u`` to compute.
        plan: instead of the one that is chosen by shape, for measurements.

    Returns:
        Gradients of ``x, weight, lam, u`` in the inputs' dtype, None where not wanted. Those of ``lam`` and
        ``u`` are laid out as ``state``, the others contiguous.
    """
    index = x.device.index
    if torch.cuda.current_device() != index:
        options = (directions, chunk_size, normalize, wanted, plan)
        with torch.cuda.device(index):
            return line_scan_backward(dy, x, weight, lam, u, state, *options)
    cupy_backend.bind(index)
    batch, height, width, _ = x.shape
    want_x, want_weight, want_lam, want_u = wanted
    dlam = torch.empty_like(state) if want_lam else None
    du = torch.empty_like(state) if want_u and u is not None else None
    groups = weight.shape[4]
    if dy.numel() == 0:
        zeros = (torch.zeros_like(x) if want_x else None, torch.zeros_like(weight) if want_weight else None)
        return *zeros, dlam, du
    dy, x, weight, lam = (unit_last_stride(t) for t in (dy, x, weight, lam))
    u = None if u is None else unit_last_stride(u)
    if plan is None:
        layouts = (_layout(x), _layout(lam), _layout(u), _layout(dy), _layout(state))
        setting = (x.dtype, x.device.index, tuple(directions), chunk_size, normalize)
        plan = _plan(x.shape, groups, *setting, True, layouts)
    tiled = plan.source in (*cupy_backend.TILED, *cupy_backend.WARP)  # partial sums as these leave them
    partial_dtype = x.dtype if tiled else torch.float32
    dx = torch.empty((len(directions), *x.shape), dtype=partial_dtype, device=x.device) if want_x else None
    dweight = None
    if want_weight:
        shape = (
            (groups * plan.channel_slices, len(directions), batch, height * width * 3)
            if tiled
            else (plan.channel_slices, *weight.shape)
        )
        dweight = torch.empty(shape, dtype=torch.float32, device=x.device)
    extra, _scratch = _extra(plan, x, normalize)
    pointers = (*map(_pointer, (dy, x, weight, lam, u, state, dx, dweight, dlam, du)), *extra)
    gate_strides = (0, 0, 0, 0) if u is None else u.stride()[:4]
    strides = (
        *dy.stride()[:4],
        *x.stride()[:3],
        *weight.stride()[:5],
        *lam.stride()[:4],
        *gate_strides,
        *state.stride()[:4],
    )
    # dx as (B, H, W, D, C), as the other gradients
    dx_view = dx.permute(1, 2, 3, 0, 4) if tiled and dx is not None else None
    inputs = ((dy, _HALO), (u, _HALO), (x, _OWN), (lam, _OWN), (state, _AROUND))
    described = (*inputs, (dx_view, _STORE), (dlam, _STORE), (du, _STORE))
    cupy_backend.launch(plan, x.dtype, x.device.index, pointers, strides, _map_words(plan, x, described))
    if tiled:
        dx, dweight = _finish(dx, dweight, x, weight, directions, normalize)
    else:
        dx = None if dx is None else dx.sum(0).to(x.dtype)
        dweight = None if dweight is None else dweight.sum(0).to(x.dtype)
    return dx, dweight, dlam, du


_FINISH_THREADS = 256


def _finish(
    dx_partial: Tensor | None,
    dweight_partial: Tensor | None,
    x: Tensor,
    weight: Tensor,
    directions: Sequence[int],
    normalize: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Sum dx over the directions and dW over the channel slices, and take dW through the normalisation."""
    if dx_partial is None and dweight_partial is None:
        return None, None
    dx = None if dx_partial is None else x.new_empty(x.shape)
    dweight = None if dweight_partial is None else x.new_empty(weight.shape)
    vec = 16 // x.element_size()
    most = 16 * cupy_backend.processors(x.device.index)
    blocks_x = 0 if dx is None else min(most, -(-x.numel() // (vec * _FINISH_THREADS)))
    blocks_w = 0 if dweight is None else min(most, -(-dweight.numel() // (3 * _FINISH_THREADS)))
    batch, height, width, channels = x.shape
    groups, itemsize = weight.shape[4], x.element_size()
    problem = Problem(batch, height, width, channels, groups, tuple(directions), 0, itemsize, True)
    slices = 0 if dweight_partial is None else dweight_partial.shape[0]
    plan = Plan(
        source=cupy_backend.FINISH,
        entry=cupy_backend.FINISH,
        vec=vec,
        run=1,
        grid=blocks_x + blocks_w,
        threads=_FINISH_THREADS,
        shared_bytes=0,
        parameters=(*problem.shape, slices, int(normalize), blocks_x),
    )
    pointers = tuple(map(_pointer, (dx_partial, dweight_partial, weight, dx, dweight)))
    cupy_backend.launch(plan, x.dtype, x.device.index, pointers, weight.stride()[:5])
    return dx, dweight
