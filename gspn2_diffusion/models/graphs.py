"""Denoiser calls replayed as CUDA graphs: one launch in the place of hundreds."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from gspn2_diffusion.layers.mixer import GSPN2Mixer

logger = logging.getLogger(__name__)

MAX_TOKENS = 16384
KEPT = 8
_TENSORS = (
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "pooled_projections",
)

Step = Callable[[], Tensor]
# Of a function that computes on buffers, makes one that computes it again; and where its result stands.
Capture = Callable[[Step], tuple[Callable[[], None], Tensor]]


class CudaCapture:
    """Captures functions as CUDA graphs that share their memory, since they run one after the other."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, step: Step) -> tuple[Callable[[], None], Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose algorithms and allocate here, not while capturing
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        return graph.replay, result


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class GraphReplay:
    """In the place of a denoiser's ``forward``: the same results, replayed from a graph where possible.

    The first call of a set of shapes runs as ever (it may compile), the second is captured, the others are
    replayed. Calls run as ever, too, with gradients, off CUDA, above ``max_tokens`` (the launches of a large
    picture hide behind its arithmetic, and a graph keeps its memory), with ``attention_kwargs``, and while a
    submodule has hooks, an adapter or another ``forward``: what those do could change unseen.

    Args:
        model: a ``GSPN2Transformer2DModel``.
        max_tokens: largest batch times tokens that is captured.
        keep: number of graphs kept; the one unused for longest goes first.
        capture: how a call is captured.
    """

    def __init__(
        self, model: Any, max_tokens: int = MAX_TOKENS, keep: int = KEPT, capture: Capture | None = None
    ) -> None:
        self._model, self._max_tokens, self._keep = model, max_tokens, keep
        self._capture = capture or CudaCapture()
        self._needs_cuda = capture is None
        self._seen: set[Any] = set()
        self._graphs: OrderedDict[Any, tuple[dict[str, Tensor], Callable[[], None], Tensor]] = OrderedDict()
        self._broken = False

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphReplay:
        return GraphReplay(memo[id(self._model)], self._max_tokens, self._keep)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's ``forward``."""
        given = dict(zip((*_TENSORS, "attention_kwargs", "return_dict"), args, strict=False)) | kwargs
        tensors = {name: given[name] for name in _TENSORS if given.get(name) is not None}
        if not self._possible(given, tensors):
            return self._run(given)
        key = self._key(tensors)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key not in self._seen:
            self._seen.add(key)
            return self._run(given)
        elif not self._add(key, tensors):
            return self._run(given)
        buffers, replay, result = self._graphs[key]
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name])
        replay()
        sample = result.clone()  # the next replay writes over it
        return Transformer2DModelOutput(sample=sample) if given.get("return_dict", True) else (sample,)

    def _run(self, given: dict[str, Any]) -> Any:
        return type(self._model).forward(self._model, **given)

    def _possible(self, given: dict[str, Any], tensors: dict[str, Any]) -> bool:
        if self._broken or torch.is_grad_enabled() or given.get("attention_kwargs"):
            return False
        if not all(isinstance(value, Tensor) for value in tensors.values()):
            return False
        if self._needs_cuda and not all(value.is_cuda for value in tensors.values()):
            return False
        latents = tensors["hidden_states"]
        tokens = latents.shape[0] * latents.shape[-1] * latents.shape[-2] // self._model.patch_size**2
        return tokens <= self._max_tokens and self._is_plain()

    def _is_plain(self) -> bool:
        """Whether no hook, adapter or other ``forward`` takes part in a call."""
        model = self._model
        return model.__dict__.get("forward") is self and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or (module is not model and "forward" in module.__dict__)
            or hasattr(module, "base_layer")
            for module in model.modules()
        )

    def _key(self, tensors: dict[str, Tensor]) -> Any:
        """All that a graph depends on: shapes and types, where the weights lie, and how the scans run."""
        shapes = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items())
        weights = hash(tuple(parameter.data_ptr() for parameter in self._model.parameters()))
        scans = tuple(
            (module.backend, module.chunk_size, _address(module.direction_scale))
            for module in self._model.modules()
            if isinstance(module, GSPN2Mixer)
        )
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        return shapes, weights, scans, autocast

    def _add(self, key: Any, tensors: dict[str, Tensor]) -> bool:
        """Capture a call; False where that fails."""
        buffers = {name: tensor.clone() for name, tensor in tensors.items()}
        try:
            replay, result = self._capture(lambda: self._run({**buffers, "return_dict": False})[0])
        except RuntimeError as error:
            logger.warning("no CUDA graphs for this denoiser, its calls run as ever: %s", error)
            self._broken = True
            return False
        self._graphs[key] = (buffers, replay, result)
        if len(self._graphs) > self._keep:
            self._graphs.popitem(last=False)
        return True


def enable_graphs(model: nn.Module, max_tokens: int = MAX_TOKENS, keep: int = KEPT) -> None:
    """Replay the calls of a ``GSPN2Transformer2DModel`` from now on; see :class:`GraphReplay`."""
    model.forward = GraphReplay(model, max_tokens, keep)


def disable_graphs(model: nn.Module) -> None:
    """Undo :func:`enable_graphs` and give the graphs' memory back; nothing happens without it."""
    if isinstance(model.__dict__.get("forward"), GraphReplay):
        del model.forward
