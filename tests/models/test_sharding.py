"""One picture on several processes: the same as on one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from tiny_denoiser import make_inputs, make_model

from gspn2_diffusion.layers.mixer import GSPN2Mixer
from gspn2_diffusion.models.sharding import shard_rows, shares, unshard_rows

CASES = [
    # options of the model, height and width of the latents
    ({}, 6, 10),  # 3 rows of tokens: shares of 2 and 1
    ({"mixer": ["none", "gspn2"], "local_perception": False}, 8, 4),
    ({"num_weight_groups": 4, "chunk_size": 2}, 14, 6),
    ({"num_weight_groups": 1, "num_layers": 1}, 4, 12),
]


def _rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)  # the parent's threads did not come along
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's name resolves to
    # They meet in a file: a port that was free may be taken by the time it is bound.
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/meeting", size), rank=rank, world_size=size
    )
    found = []
    with torch.no_grad():
        for options, height, width in CASES:
            model, inputs = make_model(**options), make_inputs(height, width)
            shard_rows(model)
            sharded = model(**inputs).sample
            assert torch.equal(sharded, model(**inputs, return_dict=False)[0])
            found.append((sharded, unshard_rows(model)(**inputs).sample))
        shard_rows(model)
        for module in model.modules():  # a layer that is more than its weights is called as a whole
            if isinstance(module, GSPN2Mixer):
                module.to_scan.register_forward_hook(lambda layer, args, out: 0.5 * out)
        sharded = model(**inputs).sample
        found.append((sharded, unshard_rows(model)(**inputs).sample))
    errors = []
    for build in (
        lambda: shard_rows(make_model(mixer="softmax")),
        lambda: shard_rows(make_model(proxy_dim=3)),
    ):
        try:
            build()
        except ValueError as error:
            errors.append(str(error))
    torch.save((found, errors), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_what_one_computes(tmp_path):
    multiprocessing.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    for rank in range(2):
        found, errors = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(CASES) + 1
        assert not torch.allclose(found[-1][1], found[-2][1], rtol=1e-2)
        for sharded, alone in found:
            assert sharded.shape == alone.shape
            assert torch.allclose(sharded, alone, rtol=1e-4, atol=1e-5)
        assert "transformer_blocks.0.mixer must be a line scan" in errors[0]
        assert "2 ranks must divide proxy_dim, got 3" in errors[1]


def test_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="start with torchrun"):
        shard_rows(make_model())


def test_shares():
    assert shares(7, 3) == [3, 2, 2]
    with pytest.raises(ValueError, match="2 rows of tokens cannot be shared out over 3 ranks"):
        shares(2, 3)
