"""Settings that ComfyUI left in a picture, as far as its graph of nodes can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Graph = dict[str, Any]
_PLAIN = {
    "seed": "Seed",
    "noise_seed": "Seed",
    "steps": "Steps",
    "cfg": "CFG scale",
    "sampler_name": "Sampler",
    "scheduler": "Schedule type",
    "denoise": "Denoising strength",
}


def parse_comfyui(text: str) -> dict[str, str]:
    """The ``prompt`` text of a ComfyUI picture in the words of A1111's settings.

    Follows the links of the first sampler: its numbers, both texts, the size of its empty latents and its
    checkpoint. What hangs on nodes of unknown shape is left out.

    Raises:
        ValueError: not a graph of nodes, or one without a sampler.
    """
    graph = json.loads(text)
    if not isinstance(graph, dict) or not all(isinstance(node, dict) for node in graph.values()):
        raise ValueError("the 'prompt' text is no ComfyUI graph")
    sampler = next(
        (node for node in graph.values() if {"positive", "negative"} <= _inputs(node).keys()), None
    )
    if sampler is None:
        raise ValueError("the ComfyUI graph has no sampler with a positive and a negative text")
    inputs = _inputs(sampler)
    values = {
        "Prompt": _first(graph, inputs["positive"], "text"),
        "Negative prompt": _first(graph, inputs["negative"], "text"),
    }
    values |= {shown: _plain(graph, inputs[key]) for key, shown in _PLAIN.items() if key in inputs}
    width, height = (_first(graph, inputs.get("latent_image"), side) for side in ("width", "height"))
    if width and height:
        values["Size"] = f"{width}x{height}"
    for key in ("ckpt_name", "unet_name"):
        values["Model"] = values.get("Model") or _first(graph, inputs.get("model"), key)
    return {key: value for key, value in values.items() if value or key in ("Prompt", "Negative prompt")}


def _inputs(node: Any) -> dict[str, Any]:
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _upstream(graph: Graph, link: Any) -> Iterator[dict[str, Any]]:
    """Inputs of the node that ``link`` names and of every node before it, nearest first."""
    waiting, seen = [link], set()
    while waiting:
        current = waiting.pop(0)
        if not _is_link(current) or current[0] in seen:
            continue
        seen.add(current[0])
        inputs = _inputs(graph.get(current[0]))
        yield inputs
        waiting.extend(inputs.values())


def _first(graph: Graph, link: Any, key: str) -> str:
    for inputs in _upstream(graph, link):
        if key in inputs and not _is_link(inputs[key]):
            return str(inputs[key])
    return ""


def _plain(graph: Graph, value: Any) -> str:
    """A value, or the one of the primitive node that it is linked to."""
    if not _is_link(value):
        return str(value)
    for inputs in _upstream(graph, value):
        for item in inputs.values():
            if isinstance(item, int | float | str):
                return str(item)
    return ""
