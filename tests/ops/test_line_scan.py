"""The operator on the CPU: against its definition, its symmetries, and bad input."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from scan_cases import SUBSETS, assert_matches, make_inputs

from gspn2_diffusion import line_scan
from gspn2_diffusion.ops.reference import normalize_weights

module = sys.modules["gspn2_diffusion.ops.line_scan"]  # the package exports a function of the same name


def scan_by_definition(x, weight, lam, u, directions, chunk_size, normalize):
    """The recurrence element by element, as it is written in the paper."""
    batch, height, width, channels = x.shape
    groups = weight.shape[4]
    y = torch.zeros(batch, height, width, len(directions), channels, dtype=x.dtype)
    for d, direction in enumerate(directions):
        vertical = direction in ("down", "up")
        lines, positions = (height, width) if vertical else (width, height)
        order = range(lines) if direction in ("down", "right") else range(lines - 1, -1, -1)
        previous = None
        for step, i in enumerate(order):
            if chunk_size and step % chunk_size == 0:
                previous = None
            current = torch.zeros(batch, positions, channels, dtype=x.dtype)
            for p in range(positions):
                at = (slice(None), i, p) if vertical else (slice(None), p, i)
                current[:, p] = lam[at][:, d] * x[at]
                neighbours = [q for q in (p - 1, p, p + 1) if 0 <= q < positions]
                raw = torch.stack([weight[at][:, d, :, q - p + 1] for q in neighbours], -1)
                w = torch.sigmoid(raw) / torch.sigmoid(raw).sum(-1, keepdim=True) if normalize else raw
                for k, q in enumerate(neighbours):
                    if previous is not None:
                        per_channel = w[..., k].repeat_interleave(channels // groups, dim=-1)
                        current[:, p] += per_channel * previous[:, q]
                y[at][:, d] = current[:, p] * (1 if u is None else u[at][:, d])
            previous = current
    return y


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 1), (4, 4), (3, 6)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
@torch.no_grad()
def test_reference_is_the_definition(size, groups, chunk_size, normalize):
    inputs = make_inputs(2, *size, 4, groups, dtype=torch.float64, normalize=normalize)
    options = {
        "directions": ("left", "down", "up", "right"),
        "chunk_size": chunk_size,
        "normalize": normalize,
    }
    expected = scan_by_definition(*inputs.values(), **options)
    torch.testing.assert_close(line_scan(**inputs, backend="reference", **options), expected)


@pytest.mark.parametrize("directions", SUBSETS)
@torch.no_grad()
def test_directions_are_independent(directions):
    inputs = make_inputs(1, 4, 5, 3, dtype=torch.float64)
    everything = line_scan(**inputs)
    pick = [("down", "up", "right", "left").index(name) for name in directions]
    some = {k: v if k == "x" else v[:, :, :, pick] for k, v in inputs.items()}
    torch.testing.assert_close(line_scan(**some, directions=directions), everything[:, :, :, pick])


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"normalize": False}])
@pytest.mark.parametrize("with_u", [True, False])
def test_gradcheck(options, with_u):
    inputs = make_inputs(1, 3, 4, 4, 2, dtype=torch.float64, with_u=with_u)
    tensors = [t for t in inputs.values() if t is not None]
    assert torch.autograd.gradcheck(lambda *a: line_scan(*a, backend="reference", **options), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 7), (33, 17)])
def test_reference_precision(dtype, size):
    assert_matches(make_inputs(2, *size, 6, 2, dtype=dtype), "reference")


def test_rows_of_weights_sum_to_one_even_when_every_sigmoid_underflows():
    raw = torch.tensor([[-300.0, -300.0, -301.0], [200.0, -200.0, 200.0], [-1.0, 2.0, 0.5]])
    weights = normalize_weights(raw.view(3, 1, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 1))
    assert weights[0, 0, 0] == 0
    assert weights[2, 0, 2] == 0


@pytest.mark.parametrize("axis", ["left-right", "up-down", "transpose"])
@torch.no_grad()
def test_mirror(axis):
    """Mirroring the picture and the roles of the directions and outer neighbours mirrors the output."""
    inputs = make_inputs(2, 5, 7, 4, 2, dtype=torch.float64)
    y = line_scan(**inputs)
    mirror, order, swapped = {
        "left-right": (lambda t: t.flip(2), [0, 1, 3, 2], [0, 1]),
        "up-down": (lambda t: t.flip(1), [1, 0, 2, 3], [2, 3]),
        "transpose": (lambda t: t.transpose(1, 2), [2, 3, 0, 1], []),
    }[axis]
    mirrored = {k: mirror(v) if k == "x" else mirror(v)[:, :, :, order] for k, v in inputs.items()}
    weight = mirrored["weight"].clone()
    for d in swapped:  # here the line itself runs the other way, so p-1 and p+1 change places
        weight[:, :, :, d] = weight[:, :, :, d].flip(-1)
    result = line_scan(**{**mirrored, "weight": weight})
    torch.testing.assert_close(result, mirror(y)[:, :, :, order])


def test_every_pixel_reaches_every_other():
    inputs = make_inputs(1, 6, 5, 1, dtype=torch.float64)
    y = line_scan(**inputs).sum(3)
    (gradient,) = torch.autograd.grad(y[0, 5, 0, 0], inputs["x"])
    assert (gradient != 0).sum() >= 20  # the cones of two scans; the other two start here


def test_autocast_casts():
    inputs = make_inputs(1, 4, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert line_scan(**inputs).dtype == torch.bfloat16


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(module, "_announced", set())
    inputs = make_inputs(1, 2, 2, 1)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        line_scan(**inputs)
        line_scan(**inputs)
    assert [r.getMessage() for r in caplog.records] == [
        "line_scan backend: reference (the tensors are on device type 'cpu')"
    ]


def test_empty_batch():
    assert line_scan(**make_inputs(0, 3, 2, 4)).shape == (0, 3, 2, 4, 4)


def _replace(**changes):
    return {**make_inputs(1, 4, 5, 6), **changes}


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"x": torch.zeros(4, 5, 6)}, {}, ValueError, r"x must have shape \(B, H, W, C\), got \(4, 5, 6\)"),
        (
            {"lam": torch.zeros(1, 4, 5, 4, 7)},
            {},
            ValueError,
            r"lam must have shape .*\(1, 4, 5, 4, 6\), got",
        ),
        ({"u": torch.zeros(1, 4, 5, 3, 6)}, {}, ValueError, "u must have shape"),
        ({"weight": torch.zeros(1, 4, 5, 4, 1, 2)}, {}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(1, 4, 5, 4, 4, 3)}, {}, ValueError, "G = 4 groups, which must divide the 6"),
        ({"lam": [1.0]}, {}, TypeError, "lam must be a torch.Tensor, got list"),
        (
            {"lam": torch.zeros(1, 4, 5, 4, 6).double()},
            {},
            TypeError,
            "lam has dtype torch.float64, but x has",
        ),
        ({"x": torch.zeros(1, 4, 5, 6, dtype=torch.int64)}, {}, TypeError, "x has dtype torch.int64"),
        (
            {"lam": torch.zeros(1, 4, 5, 4, 6, device="meta")},
            {},
            ValueError,
            "lam is on meta, but x is on cpu",
        ),
        ({}, {"directions": ("down", "down", "up", "left")}, ValueError, "directions must name"),
        ({}, {"directions": "down"}, ValueError, "directions must name"),
        ({}, {"directions": ()}, ValueError, "directions must name"),
        ({}, {"chunk_size": 0}, ValueError, "chunk_size must be None or an integer >= 1, got 0"),
        ({}, {"backend": "triton"}, ValueError, "backend must be one of"),
        (
            {},
            {"backend": "cupy"},
            ValueError,
            "backend='cupy' needs tensors on a CUDA device, got device 'cpu'",
        ),
    ],
)
def test_bad_input(changes, options, error, message):
    with pytest.raises(error, match=message):
        line_scan(**_replace(**changes), **options)
