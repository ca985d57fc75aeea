"""The line scan: GSPN-2's operator, in plain torch and in CUDA."""

from gspn2_diffusion.ops.line_scan import line_scan

__all__ = ["line_scan"]
