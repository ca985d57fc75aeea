"""``python -m gspn2_diffusion`` is the ``gspn2`` command."""

from gspn2_diffusion.cli import main

if __name__ == "__main__":
    main()
