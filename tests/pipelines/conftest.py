from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import build_tiny_pipeline

from gspn2_diffusion.pipelines.pipeline_gspn2 import GSPN2Pipeline

sys.path.insert(0, str(Path(__file__).parent))  # three_pipelines.py


@pytest.fixture
def pipe() -> GSPN2Pipeline:
    pipeline = build_tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
