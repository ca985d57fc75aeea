"""Lets diffusers load this folder by trust_remote_code=True; needs gspn2-diffusion."""

import gspn2_diffusion
from gspn2_diffusion.pipelines import GSPN2Pipeline

__all__ = ["GSPN2Pipeline"]


def __getattr__(name):
    return getattr(gspn2_diffusion, name)
