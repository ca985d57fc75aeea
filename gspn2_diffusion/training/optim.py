"""Optimisers: AdamW, and Muon for hidden matrices with all matrices of one shape orthogonalised together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.optim8bit import AdamW8bit

# Coefficients of the quintic iteration, as published with Muon and used by torch.optim.Muon.
_QUINTIC = (3.4445, -4.775, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz iteration in bfloat16.

    Args:
        matrices: (N, R, C).
        steps: iterations.
        eps: least Frobenius norm that is divided by.

    Returns:
        (N, R, C) bfloat16.
    """
    a, b, c = _QUINTIC
    work = matrices.bfloat16()
    tall = work.shape[-2] > work.shape[-1]
    if tall:
        work = work.mT
    work = work / work.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = work @ work.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, polynomial, work, beta=a)
    return work.mT if tall else work


class GroupedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` (``adjust_lr_fn="match_rms_adamw"``) for many small matrices.

    Same update, but matrices of one shape go through the iteration as one batch: a small transformer has a
    hundred of them in about six shapes, and one by one their launches cost more than the arithmetic.

    Args:
        params: matrices (2-D).
        lr: learning rate, of the size that suits AdamW.
        weight_decay: decoupled.
        momentum: Nesterov momentum.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError(f"`params` holds a tensor of shape {tuple(param.shape)}; 2-D needed")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        if closure is not None:
            raise ValueError("`closure` is not supported")
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(tuple(param.shape), []).append(param)
            for shape, params in by_shape.items():
                self._update(shape, params, group)

    def _update(self, shape: tuple[int, ...], params: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights: list[Tensor] = list(params)
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        updates = orthogonalise(torch.stack(ahead)).to(params[0].dtype).unbind(0)
        rate = 0.2 * max(shape) ** 0.5 * group["lr"]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-rate)


class JointOptimizer(torch.optim.Optimizer):
    """Several optimisers that step as one; its parameter groups are theirs, so one schedule drives all.

    Args:
        parts: optimisers over disjoint parameters.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        # Only what callers read is set: the parts own groups and state.
        self.defaults = {}
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """State of all parts by parameter; a merged copy."""
        return {key: value for part in self.parts for key, value in part.state.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every part."""
        for part in self.parts:
            part.step(closure)  # type: ignore[arg-type]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool,
) -> JointOptimizer:
    """AdamW (also with 8-bit moments) for all, or Muon for linear layers in blocks and AdamW for the rest.

    Vectors, embeddings and tables (``scale_shift_table``) get no weight decay.
    """
    muon = _block_matrices(model) if name == "muon" else {}
    rest = {key: param for key, param in model.named_parameters() if key not in muon and param.requires_grad}
    matrices = [p for key, p in rest.items() if p.ndim >= 2 and not key.endswith("table")]
    others = [p for key, p in rest.items() if p.ndim < 2 or key.endswith("table")]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    parts: list[torch.optim.Optimizer] = []
    if used and name == "adamw8bit":
        parts.append(AdamW8bit(used, lr=learning_rate, betas=betas))
    elif used:
        parts.append(torch.optim.AdamW(used, lr=learning_rate, betas=betas, fused=fused))
    if muon:
        parts.append(GroupedMuon(muon.values(), lr=learning_rate, weight_decay=weight_decay))
    return JointOptimizer(parts)


def _block_matrices(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
        if "blocks." in name or "caption_layers." in name
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
