"""Fixtures of the operator's tests."""

from collections.abc import Iterator

import pytest
import torch
from scan_cases import poisoned_memory


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Uninitialised memory of the GPU is filled with NaN, so an element that no thread wrote shows."""
    with poisoned_memory():
        assert torch.empty(3, device="cuda").isnan().all()
        yield
