"""Shared set-up: helpers in this folder are importable, GPU tests need a GPU, random numbers are seeded."""

import random
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def seed_everything(seed: int) -> None:
    """Of the global generators; the CPU's own one, since `torch.manual_seed` is slow without a GPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


# What a test draws without a generator of its own must not depend on the tests that ran before it in the same
# process, nor on whether it was the first to ask for a fixture of its module.


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any) -> None:
    seed_everything(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_everything(0)
