"""The web page: ``python app.py`` is ``gspn2 app``, with the same options."""

from __future__ import annotations

import sys

from gspn2_diffusion.cli import run

if __name__ == "__main__":
    sys.exit(run(["app", *sys.argv[1:]]))
