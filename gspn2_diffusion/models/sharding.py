"""One picture on several GPUs: rows of tokens shared out between layers, channels inside the scan.

Everything in a block but the scan is local to a token (or to its neighbours, in the local perception unit),
so each rank keeps some rows of the picture. The scan needs all rows but treats every proxy channel alone, so
inside it each rank holds some channels of the whole picture: the few proxy channels are gathered before the
scan, an all-to-all returns the rows after it. The result is that of one GPU up to the rounding of matrix
products of other shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from gspn2_diffusion.layers.feed_forward import LocalPerceptionUnit, is_plain
from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.ops.line_scan import line_scan


def shard_rows(transformer: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Make every rank of ``group`` compute its share of each picture; in place, for inference.

    All ranks must call the model (or a pipeline around it) with the same arguments and get the same result.
    State dictionaries, saving and LoRA keep their names; :func:`unshard_rows` takes it back.

    Args:
        transformer: a ``GSPN2Transformer2DModel`` whose mixers are "gspn2" or "none".
        group: of torch.distributed, which must be initialised; None for all ranks.

    Returns:
        ``transformer``.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: a mixer that is no line scan, or channels that the ranks do not divide.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("shard_rows needs torch.distributed: start with torchrun and init_process_group.")
    if "_rows_unsharded" in transformer.__dict__:
        raise ValueError("transformer is sharded already: call unshard_rows first.")
    size = dist.get_world_size(group)
    for index, block in enumerate(transformer.transformer_blocks):
        _check_mixer(f"transformer_blocks.{index}.mixer", block.mixer, size)
    for module in transformer.modules():
        if isinstance(module, GSPN2Mixer):
            module.forward = functools.partial(_mix, module, group)  # type: ignore[method-assign]
        elif isinstance(module, LocalPerceptionUnit):
            module.forward = functools.partial(_perceive, module, group)  # type: ignore[method-assign]
    transformer.__dict__["_rows_unsharded"] = transformer.forward
    transformer.forward = functools.partial(_forward, transformer, group)
    return transformer


def unshard_rows(transformer: Any) -> Any:
    """Take :func:`shard_rows` back."""
    for module in transformer.modules():
        if isinstance(module, (GSPN2Mixer, LocalPerceptionUnit)):
            module.__dict__.pop("forward", None)
    if transformer.__dict__.pop("_rows_unsharded", None) is not None:
        del transformer.forward
    return transformer


def _check_mixer(name: str, mixer: nn.Module | None, size: int) -> None:
    if mixer is None:
        return
    if not isinstance(mixer, GSPN2Mixer):
        raise ValueError(
            f"{name} must be a line scan to be shared out over channels, got {type(mixer).__name__}."
        )
    if mixer.proxy_dim % size:
        raise ValueError(f"{name}: {size} ranks must divide proxy_dim, got {mixer.proxy_dim}.")
    groups = mixer.num_weight_groups
    if groups != 1 and groups % size:
        raise ValueError(f"{name}: {size} ranks must divide num_weight_groups or it must be 1, got {groups}.")


def shares(rows: int, size: int) -> list[int]:
    """Rows of every rank: as equal as can be, the first ranks one more.

    Raises:
        ValueError: fewer rows than ranks.
    """
    if rows < size:
        raise ValueError(f"a picture of {rows} rows of tokens cannot be shared out over {size} ranks.")
    return [rows // size + (rank < rows % size) for rank in range(size)]


def _forward(transformer: Any, group: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The model on this rank's rows of the latents ``(B, C, H, W)``, then all rows of the prediction."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in transformer.parameters()):
        raise RuntimeError("a model shared out by shard_rows is for inference: use torch.no_grad().")
    patch, rank = transformer.config.patch_size, dist.get_rank(group)
    parts = shares(hidden_states.shape[2] // patch, dist.get_world_size(group))
    # The mixers cannot see the height from their share; all of them of one call need the same.
    transformer.__dict__["_row_shares"] = parts
    for module in transformer.modules():
        if isinstance(module, GSPN2Mixer):
            module.__dict__["_row_shares"] = parts
    start, count = patch * sum(parts[:rank]), patch * parts[rank]
    return_dict = kwargs.pop("return_dict", True)
    local = transformer._rows_unsharded(
        hidden_states[:, :, start : start + count], *args, return_dict=False, **kwargs
    )[0]
    rows = [part * patch for part in parts]
    sample = _gather(local.permute(2, 0, 1, 3), rows, group)
    sample = sample.permute(1, 2, 0, 3).contiguous()
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


def _exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    """All-to-all over the first dimension.

    Args:
        rows: ``(sum(send), ...)``, the part for each rank after the other.
        send, receive: rows for and from every rank.

    Returns:
        ``(sum(receive), ...)``, the part from each rank after the other.
    """
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


def _gather(rows: torch.Tensor, parts: list[int], group: Any) -> torch.Tensor:
    """``(sum(parts), ...)``: ``rows (parts[rank], ...)`` of every rank, one after the other."""
    rows = rows.contiguous()
    if len(set(parts)) == 1:
        out = rows.new_empty(sum(parts), *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows, group=group)
        return out
    copies = rows.repeat(len(parts), *[1] * (rows.ndim - 1))  # NCCL gathers equal parts only
    return _exchange(copies, [rows.shape[0]] * len(parts), parts, group)


def _mix(mixer: GSPN2Mixer, group: Any, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """:meth:`GSPN2Mixer.forward` on this rank's ``height`` rows.

    What travels is little: the proxy channels of all rows to every rank, which then projects its own share of
    the scan's inputs for the whole picture, and each rank's channels of the scan's result.
    """
    size, rank, parts = dist.get_world_size(group), dist.get_rank(group), mixer.__dict__["_row_shares"]
    batch, directions, share = hidden_states.shape[0], len(mixer.directions), mixer.proxy_dim // size
    proxy = mixer.to_proxy(hidden_states).unflatten(1, (height, width))
    whole = _gather(proxy.transpose(0, 1), parts, group).transpose(0, 1)  # (B, H, W, P)

    features = _scan_features(
        directions, mixer.proxy_dim, mixer.num_weight_groups, rank, size, hidden_states.device
    )
    groups = max(1, mixer.num_weight_groups // size)
    gates, taps = directions * share, directions * groups * 3
    scan = _project(mixer.to_scan, whole, features)
    lam, u, weight, _ = scan.split((gates, gates, taps, scan.shape[-1] - 2 * gates - taps), -1)
    y = line_scan(
        whole[..., rank * share : (rank + 1) * share],
        weight.unflatten(-1, (directions, groups, 3)),
        lam.unflatten(-1, (directions, share)),
        u.unflatten(-1, (directions, share)),
        directions=mixer.directions,
        chunk_size=mixer.chunk_size,
        backend=mixer.backend,
    )  # (B, H, W, D, P / n)
    back = _exchange(y.transpose(0, 1), parts, [height] * size, group)  # (n * h, B, W, D, P / n)
    back = back.unflatten(0, (size, height)).permute(2, 1, 3, 4, 0, 5)  # (B, h, W, D, n, P / n)
    return mixer.merge(back.reshape(batch, height * width, -1))


@functools.lru_cache(maxsize=64)  # layers are alike
def _scan_features(
    directions: int, channels: int, groups: int, rank: int, size: int, device: torch.device
) -> torch.Tensor:
    """Which outputs of ``to_scan`` a rank needs; padded to 16 bytes in half precision."""
    gates, taps = directions * channels, directions * groups * 3
    lam, u, weight = torch.arange(2 * gates + taps).split((gates, gates, taps))

    def own(features: torch.Tensor, count: int) -> torch.Tensor:
        """This rank's part of ``count`` channels or groups; a single group serves all ranks."""
        if count == 1:
            return features
        each = count // size
        return features.unflatten(0, (directions, count, -1))[:, rank * each : (rank + 1) * each].flatten()

    wanted = torch.cat((own(lam, channels), own(u, channels), own(weight, groups)))
    return torch.cat((wanted, wanted[:1].expand(-wanted.numel() % 8))).to(device)  # the padding is never read


def _project(linear: nn.Linear, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Some output features of a linear layer; all are computed where it is more than that (LoRA, hooks)."""
    if is_plain(linear):
        bias = None if linear.bias is None else linear.bias[features]
        return F.linear(x, linear.weight[features], bias)
    whole: torch.Tensor = linear(x)
    return whole[..., features]


def _perceive(
    unit: LocalPerceptionUnit, group: Any, hidden_states: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """:meth:`LocalPerceptionUnit.forward` on this rank's rows, with one row of each neighbour."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    picture = hidden_states.unflatten(1, (height, width))  # (B, h, W, C)
    edges = torch.stack((picture[:, 0], picture[:, -1]))  # (2, B, W, C)
    everyone = _gather(edges, [2] * size, group)  # first and last row of every rank
    nothing = torch.zeros_like(edges[0])
    above = everyone[2 * rank - 1] if rank > 0 else nothing
    below = everyone[2 * rank + 2] if rank < size - 1 else nothing

    def perceive(rows: torch.Tensor) -> torch.Tensor:
        """The unit on ``(B, n, W, C)``, with nothing around it."""
        return LocalPerceptionUnit.forward(unit, rows.flatten(1, 2), rows.shape[1], width).unflatten(
            1, (-1, width)
        )

    out = perceive(picture)  # right but for the first and the last row
    first = torch.cat((above[:, None], picture[:, :2], below[:, None]), dim=1)[:, :3]
    last = torch.cat((above[:, None], picture[:, -2:], below[:, None]), dim=1)[:, -3:]
    out[:, 0], out[:, -1] = perceive(first)[:, 1], perceive(last)[:, 1]
    return out.flatten(1, 2)
