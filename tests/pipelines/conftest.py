from __future__ import annotations

import pytest
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline


@pytest.fixture
def pipe() -> GSPN2Pipeline:
    pipeline = build_tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
