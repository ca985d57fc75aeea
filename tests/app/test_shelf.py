"""What the page starts with comes from the model's folder."""

from __future__ import annotations

import json

from gspn2_diffusion.webapp.shelf import Shelf


def test_steps_and_guidance_of_each_model(tmp_path):
    index = {"_class_name": "GSPN2Pipeline", "default_steps": 4, "default_guidance_scale": 1.0}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    shelf = Shelf({"usual": "gspn2-emoji", "few": str(tmp_path)})
    assert shelf.sampling("usual") == shelf.sampling("") == (20, 4.0)
    assert shelf.sampling("few") == (4, 1.0)
