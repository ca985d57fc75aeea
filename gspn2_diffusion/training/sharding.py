"""Weights split over processes (FSDP2): splitting a model, and whole tensors from and to its shards."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter lies split over the processes."""
    return any(isinstance(param, DTensor) for param in module.parameters())


def shard_model(module: nn.Module, mesh: Any, reshard_after_forward: bool, offload: bool) -> nn.Module:
    """Split every repeated block, then the rest, over the processes of `mesh`, in place.

    A forward pass gathers one block at a time; gradients and optimiser state exist in shards only. Weights
    stay as they are (float32 where they are trained): the run's autocast decides what the arithmetic uses.
    Frozen weights are split like the others, but have no gradients and no optimiser state.

    Args:
        module: on its device, uncompiled. Submodules that it lists as ``held_until_backward`` stay whole
            between the two passes, for losses that do not go through the output of the block around them.
        mesh: one-dimensional device mesh.
        reshard_after_forward: free a block's whole weights after its forward pass (least memory).
        offload: keep the shards in host memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for child in getattr(module, "held_until_backward", ()):
        fully_shard(child, **{**options, "reshard_after_forward": False})
    names = repeated_block_names(module)
    for child in module.modules():
        if type(child).__name__ in names and any(True for _ in child.parameters()):
            fully_shard(child, **options)
    fully_shard(module, **options)
    if dist.get_backend(mesh.get_group()) == "gloo":  # which knows no averages in older versions of torch
        for child in module.modules():
            reduce_by_sums = getattr(child, "set_force_sum_reduction_for_comms", None)
            if reduce_by_sums is not None:
                reduce_by_sums(True)
    return module


def repeated_block_names(module: nn.Module) -> set[str]:
    """Class names of the blocks that a model, or a model inside it, declares as repeated."""
    return {name for child in module.modules() for name in getattr(child, "_repeated_blocks", None) or ()}


def whole(tensor: Tensor) -> Tensor:
    """The whole of a split tensor (all processes must call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """`tensor`, whole on every process, laid out as `reference` is; as it is where that is not split."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    moved = tensor.to(device=reference.device, dtype=reference.dtype)
    return distribute_tensor(moved, reference.device_mesh, reference.placements, src_data_rank=None)


def agree(flag: Tensor) -> bool:
    """Whether a boolean is true on every process (all must call)."""
    number = flag.to(torch.int32)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return bool(number)
