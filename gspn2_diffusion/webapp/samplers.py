"""The schedulers on offer, all of them for models that predict a flow-matching velocity."""

from __future__ import annotations

from typing import Any

# name in the API -> name on the page
SCHEDULERS: dict[str, str] = {
    "euler": "Euler",
    "heun": "Heun (slower)",
    "dpm++2m": "DPM-Solver++ 2M",
    "unipc": "UniPC",
}

# class name recorded in a picture, or another program's name for it -> name in the API
_RECORDED = {
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "UniPCMultistepScheduler": "unipc",
    "Euler": "euler",
    "Heun": "heun",
    "DPM++ 2M": "dpm++2m",
    "UniPC": "unipc",
}


def scheduler_name(recorded: str | None) -> str | None:
    """The API's name of a scheduler that a picture was drawn with; None for one that is not on offer."""
    return _RECORDED.get(recorded or "")


def build_scheduler(name: str, own: Any) -> Any:
    """A fresh scheduler by its API name.

    Args:
        own: the model's scheduler; ``euler`` is a copy of it, so that such a picture equals the command
            line's, and the others take over its shift.
    """
    import diffusers

    if name == "euler":
        return type(own).from_config(own.config)
    shift = float(own.config.get("shift", 1.0))
    if name == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    multistep = {
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[name]
    return multistep(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
