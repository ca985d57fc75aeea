"""What stands in the place of a converted layer's attention, and how it learns the height and width.

A diffusers block gives its attention tokens only. A token count does not tell 32 x 64 from 64 x 32, so the
size is handed down instead: a hook on the module that turns a picture into tokens puts the token grid into
the ``cross_attention_kwargs`` that it passes to its blocks, and a hook on each block takes it out again and
gives it to the block's mixer. The grid thus travels with the arguments of the very call, also when gradient
checkpointing runs a block a second time. Sana's blocks get height and width anyway.

All hooks are plain functions of the module that they are called with, so copies of a model work.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer

_GRID_KEY = "gspn2_grid"
# Places of arguments in the forward of diffusers' blocks, which pass them by position when checkpointing.
_CROSS_ATTENTION_KWARGS_AT = 5
_SANA_HEIGHT_AT, _SANA_WIDTH_AT = 5, 6


class GSPN2SelfAttention(nn.Module):
    """A :class:`GSPN2Mixer` with the call of diffusers' ``Attention``.

    The block's hook sets :attr:`grid` right before every call of the block.

    Args:
        mixer: mixes tokens of the block's width.
    """

    def __init__(self, mixer: GSPN2Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.grid: tuple[int, int] | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Mix ``hidden_states (B, height*width, dim)``; other keyword arguments are for other processors.

        Raises:
            ValueError: text or a mask came, or the block was called outside its model.
        """
        if encoder_hidden_states is not None:
            raise ValueError(
                "encoder_hidden_states must be None: a line scan mixes the picture's own tokens."
            )
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: a line scan has no attention scores to mask.")
        if self.grid is None:
            raise ValueError("the height and width are not known: call the model, not one of its blocks.")
        return self.mixer(hidden_states, *self.grid)


def announce_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of ``Transformer2DModel`` and its like: ``hidden_states (B, C, H, W)`` to its grid."""
    picture = args[0] if args else kwargs["hidden_states"]
    patch = module.config.get("patch_size", None) or 1  # type: ignore[union-attr,operator]
    grid = (picture.shape[-2] // patch, picture.shape[-1] // patch)
    passed = kwargs.get("cross_attention_kwargs") or {}
    return args, {**kwargs, "cross_attention_kwargs": {**passed, _GRID_KEY: grid}}


def take_grid(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Forward pre-hook of ``BasicTransformerBlock``: the grid out of the arguments and into the mixer."""
    positional = len(args) > _CROSS_ATTENTION_KWARGS_AT
    passed = args[_CROSS_ATTENTION_KWARGS_AT] if positional else kwargs.get("cross_attention_kwargs")
    if not passed or _GRID_KEY not in passed:
        return args, kwargs
    if isinstance(block.attn1, GSPN2SelfAttention):
        block.attn1.grid = passed[_GRID_KEY]
    rest = {key: value for key, value in passed.items() if key != _GRID_KEY} or None
    if positional:
        at = _CROSS_ATTENTION_KWARGS_AT
        return (*args[:at], rest, *args[at + 1 :]), kwargs
    return args, {**kwargs, "cross_attention_kwargs": rest}


def read_sana_grid(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of ``SanaTransformerBlock``, which is called with ``height`` and ``width``."""
    height = args[_SANA_HEIGHT_AT] if len(args) > _SANA_HEIGHT_AT else kwargs["height"]
    width = args[_SANA_WIDTH_AT] if len(args) > _SANA_WIDTH_AT else kwargs["width"]
    if isinstance(block.attn1, GSPN2SelfAttention):
        block.attn1.grid = (height, width)


def add_grid_hooks(model: nn.Module) -> None:
    """Give every block of ``model`` its grid from now on; does nothing where that is done already."""
    for module in model.modules():
        if isinstance(module, SanaTransformerBlock):
            _hook_once(module, read_sana_grid)
        elif isinstance(module, BasicTransformerBlock):
            _hook_once(module, take_grid)
        elif any(isinstance(block, BasicTransformerBlock) for block in _blocks(module)):
            _hook_once(module, announce_grid)


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks = getattr(module, "transformer_blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def _hook_once(module: nn.Module, hook: Any) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)
