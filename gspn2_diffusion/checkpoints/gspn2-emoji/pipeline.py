"""Lets diffusers load this folder by trust_remote_code=True; needs gspn2-diffusion."""

import gspn2_diffusion
from gspn2_diffusion.pipelines import GSPN2Pipeline

__all__ = ["GSPN2Pipeline"]

# diffusers runs this in the module of the folder that it loaded before, and wants to find one pipeline there.
for _other in [key for key in globals() if key.startswith("GSPN2") and key not in __all__]:
    del globals()[_other]


def __getattr__(name):
    return getattr(gspn2_diffusion, name)
