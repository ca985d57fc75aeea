"""Models that were saved and loaded: the same weights, whatever bits the processor makes of them."""

from __future__ import annotations

from typing import Any

import torch


def assert_same_weights(found: Any, wanted: Any) -> None:
    """All weights of two models, or of the models of two pipelines, are equal bit by bit.

    What they compute need not be: weights that were read from a file begin at other addresses, and matrix
    products may add up in another order where their operands are aligned differently (as oneMKL's do on some
    processors). So compare results with a tolerance.
    """
    if hasattr(wanted, "components"):
        names = [name for name, part in wanted.components.items() if isinstance(part, torch.nn.Module)]
        assert names
        for name in names:
            assert_same_weights(getattr(found, name), getattr(wanted, name))
        return
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
