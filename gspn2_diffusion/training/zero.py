"""DeepSpeed's ZeRO 1 and 2: gradients and optimiser state split over the processes, weights whole on each.

Checkpoints are those of every other run: the moments are put together when they are written, and split when
they are read, so DeepSpeed's own pickled files are never made.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.config import ConfigError, RunConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def wanted_stage(accelerator: Any) -> int | None:
    """The ZeRO stage that accelerate was launched with; None without DeepSpeed.

    Raises:
        ConfigError: DeepSpeed is not installed, or a stage or offloading that only FSDP2 does here.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true", "yes"):
        return None
    instead = "configs/accelerate/fsdp2.yaml splits the weights as well"
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    settings = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    stage = int(settings.get("stage", os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
    if stage not in (1, 2):
        raise ConfigError(f"DeepSpeed's ZeRO stage is {stage}; allowed: 1, 2 ({instead})")
    for name in ("offload_optimizer", "offload_param"):
        device = settings.get(name, {}).get("device", "none")
        if device not in (None, "none"):
            raise ConfigError(f"DeepSpeed's `{name}` is on {device!r}; allowed: none ({instead})")
    return stage


def check_installed() -> None:
    """Raise ConfigError where DeepSpeed is asked for and missing."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "accelerate is to use DeepSpeed, which is not installed: pip install deepspeed, or launch with "
            "configs/accelerate/fsdp2-zero2.yaml, which splits the same and more"
        )


class InAutocast(nn.Module):
    """A module in the run's autocast, which DeepSpeed would turn off around it."""

    def __init__(self, module: nn.Module, autocast: Callable[[], contextlib.AbstractContextManager[Any]]):
        super().__init__()
        self.module, self._autocast = module, autocast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's."""
        with self._autocast():
            return self.module(*args, **kwargs)


class ZeroEngine:
    """A DeepSpeed engine around a module and its AdamW.

    Args:
        module: what is trained, with the weights to begin with.
        optimizer: a fresh AdamW over the trained parameters of the module.
        moments: the optimiser's state by name of a checkpoint, to go on with; empty to begin anew.
        stage: 1 or 2.
        config: the run's settings.
        autocast: the run's autocast.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        moments: dict[str, Tensor],
        stage: int,
        config: RunConfig,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # As a checkpoint numbers them, before DeepSpeed puts flat parts into the groups.
        self._params: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
        self._base = optimizer
        settings = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.max_grad_norm,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        self.engine: Any = deepspeed.initialize(
            model=InAutocast(module, autocast),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )[0]
        if moments:
            self._load(moments)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of one micro-step, whose loss is already a share of the step's."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()

    def step(self, device: torch.device) -> Tensor:
        """Clip, update, clear; the norm of the gradients before clipping."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser's state, whole, under the names of a checkpoint; all processes must call."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        steps = self._steps()
        found: dict[str, Tensor] = {}
        for index, param in enumerate(self._params):
            for key in _MOMENTS:
                whole = safe_get_full_optimizer_state(param, key)
                found[f"0.{index}.{key}"] = whole.reshape(param.shape)
            found[f"0.{index}.step"] = steps.clone()
        return found

    def held(self) -> int:
        """Numbers of weights whose optimiser state is in this process."""
        return sum(flat.numel() for group in self._base.param_groups for flat in group["params"])

    def _load(self, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        step = next(value for name, value in moments.items() if name.endswith(".step"))
        for group in self._base.param_groups:
            for flat in group["params"]:
                state = {key: torch.zeros_like(flat) for key in _MOMENTS}
                self._base.state[flat] = {"step": step.clone().to(self._step_device(flat)), **state}
        self._link()
        for index, param in enumerate(self._params):
            for key in _MOMENTS:
                value = moments[f"0.{index}.{key}"].to(param.device, torch.float32)
                safe_set_full_optimizer_state(param, value, key)

    def _link(self) -> None:
        """DeepSpeed 0.19 links parameters and state after the first group's step, too early for others."""
        optimizer = self.engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def _step_device(self, flat: Tensor) -> torch.device:
        fused = bool(self._base.param_groups[0].get("fused"))
        return flat.device if fused else torch.device("cpu")

    def _steps(self) -> Tensor:
        return next(iter(self._base.state.values()))["step"].detach().float().cpu()
