"""Fixtures of the operator's tests."""

from collections.abc import Iterator

import pytest
from scan_cases import poisoned_memory


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_memory():
        yield
