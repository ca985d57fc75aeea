"""AdamW with moments in 8 bits: a quarter of the optimiser's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256
MINIMUM = 4096  # smaller tensors keep float32 moments, as in the paper


def pack(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes and each block's largest magnitude.

    As in "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861) every block of 256 values has its
    own scale and the codes are finer towards zero; here by a power law (square, or cube without a sign)
    instead of a table, so coding is arithmetic alone.

    Args:
        values: any shape, float32; not negative unless `signed`.
        signed: codes are int8 in -127..127, otherwise uint8 in 0..255.

    Returns:
        Codes ``(blocks, 256)``, scales ``(blocks, 1)`` float32.
    """
    rows = F.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = rows.abs().amax(dim=1, keepdim=True)
    share = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)
    if signed:
        return (share.sign() * share.abs().sqrt() * 127).round().to(torch.int8), scales
    # A second moment must not fall to zero while it is not: the update divides by it.
    codes = (share.pow(1 / 3) * 255).round().clamp(min=1) * (rows > 0)
    return codes.to(torch.uint8), scales


def unpack(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """What `pack` coded, float32, in `shape`."""
    if codes.dtype == torch.int8:
        share = codes.float() / 127
        rows = share * share.abs() * scales
    else:
        rows = (codes.float() / 255).pow(3) * scales
    return rows.flatten()[: shape.numel()].view(shape)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose moments are kept by `pack`; tensors under 4096 values stay exact.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: least denominator.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("`closure` is not supported")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], param.grad
        if grad is None:
            return
        grad = grad.float()
        first, second = self._moments(param, state)
        beta1, beta2 = group["betas"]
        count = state["step"] + 1
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale1, scale2 = 1 - beta1**count, 1 - beta2**count
        param.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (second / scale2).sqrt_().add_(group["eps"])
        param.sub_(group["lr"] * (first / scale1) / denominator)
        state["step"] = count
        self._keep(state, first, second)

    def _moments(self, param: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            return torch.zeros_like(param, dtype=torch.float32), torch.zeros_like(param, dtype=torch.float32)
        if "exp_avg" in state:
            return state["exp_avg"], state["exp_avg_sq"]
        first = unpack(state["codes1"], state["scales1"], param.shape)
        return first, unpack(state["codes2"], state["scales2"], param.shape)

    def _keep(self, state: dict[str, Any], first: Tensor, second: Tensor) -> None:
        if first.numel() < MINIMUM:
            state["exp_avg"], state["exp_avg_sq"] = first, second
            return
        state["codes1"], state["scales1"] = pack(first, signed=True)
        state["codes2"], state["scales2"] = pack(second, signed=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; the base class would turn the integer codes into the parameters' float type."""
        codes = {
            (index, key): value
            for index, entry in state_dict["state"].items()
            for key, value in entry.items()
            if key != "step"
        }
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        for (index, key), value in codes.items():
            self.state[params[index]][key] = value.to(params[index].device).clone()
