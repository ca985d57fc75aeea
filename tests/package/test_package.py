"""What importing and describing the package costs and tells."""

from __future__ import annotations

import subprocess
import sys

from gspn2_diffusion.environment import describe_environment


def test_import_is_light():
    """Nothing heavy comes in before it is used, least of all CuPy."""
    code = (
        "import sys, gspn2_diffusion; assert callable(gspn2_diffusion.line_scan); "
        "print(*[name for name in ('cupy', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_exists():
    import gspn2_diffusion

    for name in gspn2_diffusion.__all__:
        assert getattr(gspn2_diffusion, name) is not None


def test_environment_names_versions_and_commit():
    import torch

    found = describe_environment()
    assert found["torch"] in (torch.__version__, torch.__version__.split("+")[0])  # from PyPI
    assert found["gpus"] == torch.cuda.device_count()
    assert found["commit"] == "unknown" or len(str(found["commit"]).rstrip("+")) == 40
