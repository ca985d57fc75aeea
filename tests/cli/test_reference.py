"""``docs/cli.md`` is what the commands say; the light commands stay light."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gspn2_diffusion.cli import reference

ROOT = Path(__file__).parents[2]


def test_page_is_current():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference.page(), "run: python -m gspn2_diffusion.cli.reference > docs/cli.md"


def test_page_names_every_option_that_the_parser_knows(gspn2):
    for command in reference.COMMANDS:
        help_text = gspn2(command.__name__, "--help").out
        known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", help_text)) - {"--help"}
        section = reference.page().split(f"## gspn2 {command.__name__}\n")[1].split("\n## ")[0]
        for option in known:
            assert f"`{option}" in section or f"{option}`" in section or f"{option}," in section, option


@pytest.mark.parametrize("arguments", ["--help", "batch - --out x --dry-run", "info picture.png"])
def test_no_torch_where_nothing_is_drawn(tmp_path, arguments):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    code = (
        "import sys; from gspn2_diffusion.cli import run; run(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        input="a {red|blue} apple\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
