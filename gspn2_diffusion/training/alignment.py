"""The two stages of distillation as modules, so that distributed wrappers see one forward pass.

Stage 1 trains every mixer alone on what the teacher's attention gets and gives. Stage 2 trains the student as
a whole with two taps in every block, after the mixer and after the block, through small adapters (C-GSPN,
arXiv 2606.00746).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gspn2_diffusion.training.objective import Question
from gspn2_diffusion.training.students import Site


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error over the mean square of what is wanted, float32."""
    wanted = wanted.float()
    return (found.float() - wanted).pow(2).mean() / wanted.pow(2).mean().clamp(min=1e-8)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class BlockAlignment(nn.Module):
    """Stage 1: the student's forward pass in which every mixer hands on what the attention would have.

    All other weights are the teacher's, so every mixer sees the teacher's own inputs; nothing flows from one
    block's mixer to another's, and no second forward pass is needed.

    Args:
        student: only its mixers are trained.
        teacher: frozen.
        sites: where they differ.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        student.requires_grad_(False)
        self.student: Any = student
        self._errors: dict[str, Tensor] = {}
        # In a list, so that the teacher is no part of this module and is neither trained nor saved.
        self._teacher = [{site.name: teacher.get_submodule(site.name) for site in sites}]
        layers = [student.get_submodule(site.name).requires_grad_(True) for site in sites]
        for site, layer in zip(sites, layers, strict=True):
            layer.register_forward_hook(self._hook(site.name), with_kwargs=True)
        # What they hand on has no gradient, so FSDP2 could not know when to gather them again.
        self.held_until_backward = tuple(layers)
        self._aligning = False

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._aligning:
                return None
            with torch.no_grad():
                wanted = self._teacher[0][name](*args, **kwargs)
            self._errors[name] = relative_error(output, wanted)
            return wanted.to(output.dtype)

        return hook

    def forward(self, question: Question, conditions: dict[str, Any]) -> Tensor:
        """Mean over the sites of the relative errors of their outputs."""
        self._errors, self._aligning = {}, True
        try:
            question.ask(self.student, conditions)
        finally:
            self._aligning = False
        return torch.stack(list(self._errors.values())).mean()


class Adapter(nn.Module):
    """``x + up(down(x))``: what a tap may differ by. It starts as the identity and is dropped afterwards.

    Args:
        width: channels.
        rank: channels in between.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, min(rank, width), bias=False)
        self.up = nn.Linear(min(rank, width), width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(..., width)`` to the same shape."""
        return hidden_states + self.up(self.down(hidden_states))


class _Taps:
    """Collects the outputs of some modules of a model during a forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.found: dict[str, Tensor] = {}
        self.listening = False
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                self.found[name] = _first(output)

        return hook

    def ask(self, model: nn.Module, question: Question, conditions: dict[str, Any]) -> Tensor:
        """The model's answer; what was tapped is in `found`."""
        self.found, self.listening = {}, True
        try:
            return question.ask(model, conditions)
        finally:
            self.listening = False


class EndToEnd(nn.Module):
    """Stage 2: data, the teacher's output and the taps as one loss.

    Args:
        student: trained, as far as its parameters need gradients.
        teacher: frozen.
        sites: where they differ.
        weights: of the errors against the data, the teacher's output, the mixers and the blocks.
        rank: of the adapters.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        sites: Sequence[Site],
        weights: tuple[float, float, float, float],
        rank: int,
    ) -> None:
        super().__init__()
        self.student: Any = student
        self._task, self._output, self._mixer, self._block = weights
        self._sites = list(sites)
        self._teacher = [teacher]
        adapters: dict[str, nn.Module] = {}
        for kind, weight in (("mixer", self._mixer), ("block", self._block)):
            if weight:
                adapters |= {f"{kind}_{n}": Adapter(site.width, rank) for n, site in enumerate(sites)}
        self.adapters = nn.ModuleDict(adapters)
        names = self._tapped()
        self._student_taps, self._teacher_taps = _Taps(student, names), _Taps(teacher, names)

    def _tapped(self) -> list[str]:
        mixers = [site.name for site in self._sites] if self._mixer else []
        blocks = [site.block for site in self._sites] if self._block else []
        return list(dict.fromkeys([*mixers, *blocks]))

    def forward(self, question: Question, conditions: dict[str, Any]) -> Tensor:
        """The whole loss."""
        with torch.no_grad():
            wanted = self._teacher_taps.ask(self._teacher[0], question, conditions)
        found = self._student_taps.ask(self.student, question, conditions)
        loss = self._task * question.errors(found).mean()
        loss = loss + self._output * (question.weight * (found - wanted).pow(2).mean(dim=(1, 2, 3))).mean()
        for kind, weight in (("mixer", self._mixer), ("block", self._block)):
            if weight:
                loss = loss + weight * self._tap_error(kind)
        return loss

    def _tap_error(self, kind: str) -> Tensor:
        errors = []
        for number, site in enumerate(self._sites):
            name = site.name if kind == "mixer" else site.block
            adapted = self.adapters[f"{kind}_{number}"](self._student_taps.found[name])
            errors.append(relative_error(adapted, self._teacher_taps.found[name]))
        return torch.stack(errors).mean()
