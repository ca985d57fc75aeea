"""Launches that are ready but for the tensors' addresses, kept for every shape and layout that occurs.

On small pictures, choosing a plan and packing a kernel's arguments costs the host more than the kernel costs
the GPU, so everything that follows from shapes and strides is done once.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gspn2_diffusion.ops import cupy_backend
from gspn2_diffusion.ops.plane_plans import choose_plane_tile, fits_planes, plane_plan
from gspn2_diffusion.ops.plans import Plan, Problem, generic_plan, tiled_plan
from gspn2_diffusion.ops.tensor_maps import (
    AROUND,
    HALO,
    OWN,
    STORE,
    STORE_WIDE,
    Mapped,
    Strides,
    tensor_maps,
)
from gspn2_diffusion.ops.tile_choice import choose_tile


class Setting(NamedTuple):
    """What a scan is asked to do, but for its tensors."""

    dtype: torch.dtype
    device: int  # index of the CUDA device
    directions: tuple[int, ...]
    chunk: int  # 0 for none
    normalize: bool


Layout = tuple[torch.Size, Strides, torch.dtype, torch.device]


class Call(NamedTuple):
    """All that a forward launch depends on but the addresses, and all that can be wrong about its tensors."""

    directions: tuple[int, ...]
    chunk: int  # 0 for none
    normalize: bool
    alignment: int  # the addresses of x, lam and u modulo 16, combined by bitwise or
    weight_alignment: int  # that of weight modulo 16
    x: Layout
    weight: Layout
    lam: Layout
    u: Layout | None

    @property
    def setting(self) -> Setting:
        _, _, dtype, device = self.x
        return Setting(dtype, device.index, self.directions, self.chunk, self.normalize)


def describe(
    x: Tensor,
    weight: Tensor,
    lam: Tensor,
    u: Tensor | None,
    directions: tuple[int, ...],
    chunk: int,
    normalize: bool,
) -> Call:
    """The record of a call, whose tensors have addresses."""
    addresses, gate = x.data_ptr() | lam.data_ptr(), None
    if u is not None:
        addresses |= u.data_ptr()
        gate = (u.shape, u.stride(), u.dtype, u.device)
    return Call(
        directions,
        chunk,
        normalize,
        addresses % 16,
        weight.data_ptr() % 16,
        (x.shape, x.stride(), x.dtype, x.device),
        (weight.shape, weight.stride(), weight.dtype, weight.device),
        (lam.shape, lam.stride(), lam.dtype, lam.device),
        gate,
    )


def choose_plan(
    shape: Strides,
    groups: int,
    setting: Setting,
    backward: bool,
    strides: Sequence[Strides],
    weights: Sequence[Strides],
    alignment: int,
) -> Plan:
    """The plan for a problem and its tensors' layouts.

    =========  ==============================================================  ==============================
    kernels    chosen for                                                      64 x 1024 x 1024, 1 channel:
                                                                               forward on an H200
    =========  ==============================================================  ==============================
    tiled      vectors of 16 bytes fit a group's channels, strides, addresses  (no vector of channels)
    plane      one channel, rows in one piece each                             3.3 ms
    generic    anything else                                                   21.8 ms
    =========  ==============================================================  ==============================

    Args:
        shape: ``(B, H, W, C)``.
        strides: of each tensor that is read in vectors, of all dimensions but the last, which has stride 1.
        weights: all strides of the coefficients, and of their gradients.
        alignment: the tensors' addresses modulo 16, combined by bitwise or.
    """
    dtype, device, directions, chunk, normalize = setting
    batch, height, width, channels = shape
    itemsize = dtype.itemsize
    sizes = (batch, height, width, len(directions))
    touching = all(each[2] == channels for each in strides)
    problem = Problem(batch, height, width, channels, groups, directions, chunk, itemsize, backward, touching)
    vec = _vector_width(problem, strides, alignment)
    limit, processors = cupy_backend.shared_limit(device), cupy_backend.processors(device)
    planar = all(fits_planes(problem, strides, each, alignment) for each in weights)
    if planar and cupy_backend.has_barriers(device):
        plane = choose_plane_tile(problem, cupy_backend.clusters(device), limit, processors)
        plan = None if plane is None else plane_plan(problem, plane, normalize, limit)
        if plan is not None:
            return plan
    # The accelerator does not take a stride of zero, as an expanded tensor has.
    dense = all(
        stride > 0 or size == 1 for each in strides for stride, size in zip(each, sizes, strict=False)
    )
    if vec * problem.itemsize == 16 and dense:
        tile = choose_tile(problem, cupy_backend.clusters(device), limit, processors)
        plan = None if tile is None else tiled_plan(problem, tile, normalize, limit)
        if plan is not None:
            return plan
    return generic_plan(problem, vec, limit)


def _vector_width(problem: Problem, strides: Sequence[Strides], alignment: int) -> int:
    """Elements of the widest access, up to 16 bytes, that every tensor's address and strides allow."""
    sizes = (problem.batch, problem.height, problem.width, len(problem.directions))
    vec = 16 // problem.itemsize
    while vec > 1:
        if (
            problem.per_group % vec == 0
            and alignment % (vec * problem.itemsize) == 0
            and all(
                stride % vec == 0 or size == 1
                for each in strides
                for stride, size in zip(each, sizes, strict=False)
            )
        ):
            break
        vec //= 2
    return vec


class Launch:
    """A plan for tensors of given shape and strides; called with their addresses.

    Args:
        shape: ``(B, H, W, C)``.
        strides: as the kernel takes them, after the plan's parameters.
        mapped: the operands that a tiled plan copies.
    """

    def __init__(
        self,
        plan: Plan,
        shape: Strides,
        setting: Setting,
        strides: Sequence[int],
        mapped: Sequence[Mapped] = (),
    ) -> None:
        self.plan = plan
        self.setting = setting
        self.device = setting.device
        generic = plan.source in cupy_backend.GENERIC
        flags = (int(setting.normalize),) if generic else ()
        self.scratch_floats = plan.scratch_floats if generic else None
        padding = (0,) * 8 if plan.tile is not None else ()  # with maps, the struct is a multiple of 64 bytes
        self._rest = array("q", (*flags, *plan.parameters, *strides, *padding))
        self._start = cupy_backend.starter(plan, setting.dtype, setting.device)
        self._maps: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None
        if plan.tile is not None:
            self._maps = functools.partial(
                tensor_maps,
                plan,
                shape,
                setting.dtype,
                setting.device,
                len(setting.directions),
                tuple(mapped),
            )
        # The caching allocator hands out the same addresses again and again.
        self._packed = functools.lru_cache(maxsize=1024)(self._pack)

    def _pack(self, *addresses: int) -> cupy_backend.Packed:
        maps = () if self._maps is None else self._maps(addresses)
        return cupy_backend.Packed(array("q", (*maps, *addresses, *self._rest)))

    def __call__(self, *pointers: int) -> None:
        """On the launch's device, which is current, and torch's current stream; 0 is no tensor."""
        if self.scratch_floats is None:
            self._start(self._packed(*pointers))
        elif self.scratch_floats == 0:
            self._start(self._packed(*pointers, 0))
        else:
            scratch = torch.empty(self.scratch_floats, dtype=torch.float32, device=f"cuda:{self.device}")
            self._start(self._packed(*pointers, scratch.data_ptr()))


# ---- the scan's two kernels ---------------------------------------------------------------------


def _gate_strides(u: Strides | None) -> Strides:
    return (0, 0, 0, 0) if u is None else u[:4]


@functools.lru_cache(maxsize=4096)
def forward_launch(call: Call, plan: Plan | None = None) -> Launch:
    """The launch of a forward kernel, which takes the addresses of ``x, weight, lam, u, y, state``.

    Args:
        call: whose tensors' last dimensions have stride 1 or size 1. ``y`` and the states are laid out as
            ``torch.empty_like(lam)``.
        plan: instead of the one that is chosen.
    """
    setting, (shape, x, *_), (weight_shape, weight, *_), (_, lam, *_) = call.setting, *call[5:8]
    u = None if call.u is None else call.u[1]
    y = torch.empty_like(torch.empty_strided(*call.lam[:2], device="meta")).stride()
    if plan is None:
        read = [each[:-1] for each in (x, lam, u) if each is not None]
        alignment = call.alignment | (call.weight_alignment if shape[3] == 1 else 0)
        plan = choose_plan(shape, weight_shape[4], setting, False, read, (weight,), alignment)
    strides = (*x[:3], *weight[:5], *lam[:4], *_gate_strides(u), *y[:4])
    mapped = (
        Mapped(0, HALO, x[:3]),
        Mapped(2, HALO, lam[:4]),
        Mapped(3, OWN, _gate_strides(u)),
        Mapped(4, STORE, y[:4]),
        Mapped(5, STORE_WIDE, y[:4]),
    )
    return Launch(plan, shape, setting, strides, mapped)


@functools.lru_cache(maxsize=4096)
def backward_launch(
    shape: Strides,
    groups: int,
    setting: Setting,
    dy: Strides,
    x: Strides,
    weight: Strides,
    lam: Strides,
    u: Strides | None,
    state: Strides,
    dweight: Strides,
    alignment: int,
    plan: Plan | None,
) -> Launch:
    """The launch of a backward kernel: addresses of ``dy, x, weight, lam, u, state, dx, dweight, dlam, du``.

    Args:
        shape: of ``x``.
        dy, x, weight, lam, u, state: strides; the gradients of ``lam`` and ``u`` have those of ``state``,
            ``dx`` is contiguous with the directions outermost.
        dweight: strides of the weights' gradient where a kernel finishes it, as one for a single channel.
        alignment: the addresses of ``dy``, ``x``, ``lam``, ``u`` and ``state``, of one channel also of
            ``weight``, modulo 16, combined by bitwise or.
        plan: instead of the one that is chosen.
    """
    read = [each[:-1] for each in (x, lam, u, dy, state) if each is not None]
    plan = plan or choose_plan(shape, groups, setting, True, read, (weight, dweight), alignment)
    strides = (*dy[:4], *x[:3], *weight[:5], *lam[:4], *_gate_strides(u), *state[:4])
    if plan.source in cupy_backend.PLANE:
        strides += dweight[:4]
    batch, height, width, channels = shape
    dx = (height * width * channels, width * channels, channels, batch * height * width * channels)
    mapped = (
        Mapped(0, HALO, dy[:4]),
        Mapped(4, HALO, _gate_strides(u)),
        Mapped(1, OWN, x[:3]),
        Mapped(3, OWN, lam[:4]),
        Mapped(5, AROUND, state[:4]),
        Mapped(6, STORE, dx),
        Mapped(8, STORE, state[:4]),
        Mapped(9, STORE_WIDE, state[:4]),
    )
    return Launch(plan, shape, setting, strides, mapped)


# ---- what finishes the backward pass ------------------------------------------------------------

# As in cuda/line_scan_finish.cu: threads, rows and columns of a part, floats that it keeps of each direction.
_FINISH_THREADS, _FINISH_PART, _FINISH_FLOATS = 256, (16, 32), 3 * 16 * 34 + 8
FINISH_BY_LINES = 4096  # pixels times weight groups up to which dW is summed by lines: (1, 64, 64, 768) 11 us
# with dx instead of 17; (8, 64, 64, 96) would take 15 instead of 12


class _Summed(NamedTuple):
    """How the weights' gradient is summed."""

    apart: bool  # each direction of a part of the picture by a block of its own
    share: int  # warps for the slices of 32 positions of a line; 0: by parts of the picture
    blocks: int
    floats: int  # of shared memory


def _finish_by_lines(shape: Strides, groups: int, directions: int, slices: int) -> _Summed:
    batch, height, width, _ = shape
    warps = _FINISH_THREADS // 32
    share = min(warps, 1 << (max(1, slices // groups).bit_length() - 1))
    pieces = max(height * -(-width // 32), width * -(-height // 32))
    blocks = -(-batch * groups * directions * pieces * share // warps)
    return _Summed(False, share, blocks, 3 * _FINISH_THREADS)


def _finish_by_parts(shape: Strides, groups: int, directions: int, device: int) -> _Summed:
    batch, height, width, _ = shape
    parts = batch * groups * -(-height // _FINISH_PART[0]) * -(-width // _FINISH_PART[1])
    apart = parts < 4 * cupy_backend.processors(device)
    slots = 1 if apart else directions  # that a block has
    return _Summed(apart, 0, parts * directions // slots, slots * _FINISH_FLOATS)


@functools.lru_cache(maxsize=4096)
def finish_launch(
    shape: Strides,
    groups: int,
    setting: Setting,
    weight: Strides,
    slices: int,
    want_x: bool,
    want_weight: bool,
) -> Launch:
    """The launch that sums partial gradients: addresses of both, of ``weight``, ``dx`` and ``dweight``.

    Args:
        shape: of ``x``.
        weight: strides.
        slices: partial sums of the weights' gradient.
        want_x, want_weight: which of the two to sum.
    """
    dtype, device, directions, _, normalize = setting
    batch, height, width, channels = shape
    vec, most = 16 // dtype.itemsize, 16 * cupy_backend.processors(device)
    pixels = batch * height * width
    blocks_x = min(most, -(-pixels * channels // (vec * _FINISH_THREADS))) if want_x else 0
    if pixels * groups <= FINISH_BY_LINES:
        apart, share, count, floats = _finish_by_lines(shape, groups, len(directions), slices)
    else:
        apart, share, count, floats = _finish_by_parts(shape, groups, len(directions), device)
    blocks_weight = min(most, count) if want_weight else 0
    problem = Problem(batch, height, width, channels, groups, directions, 0, dtype.itemsize, True)
    plan = Plan(
        source=cupy_backend.FINISH,
        entry=cupy_backend.FINISH,
        vec=vec,
        run=1,
        grid=blocks_x + blocks_weight,
        threads=_FINISH_THREADS,
        shared_bytes=4 * floats if want_weight else 0,
        parameters=(*problem.shape, slices, int(normalize), blocks_x, int(apart), share),
    )
    return Launch(plan, shape, setting, weight[:5])
