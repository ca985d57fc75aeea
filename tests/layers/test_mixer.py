"""GSPN2Mixer: shapes, layout, exact symmetries, gradients, errors."""

from __future__ import annotations

import pytest
import torch

from gspn2_diffusion import line_scan
from gspn2_diffusion.layers.mixer import GSPN2Mixer

GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5), (8, 8)]


def make_mixer(dim: int = 16, proxy_dim: int = 4, **options) -> GSPN2Mixer:
    """A mixer in which every feature differs from every other and nothing is zero."""
    torch.manual_seed(0)
    mixer = GSPN2Mixer(dim, proxy_dim, backend="reference", **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return mixer


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_weight_groups": 2}, {"num_weight_groups": 4, "chunk_size": 2}, {"directions": ("left",)}],
)
def test_matches_the_written_out_computation(height, width, options):
    mixer = make_mixer(**options).double()
    tokens = torch.randn(2, height * width, 16, dtype=torch.float64)
    d, p, g = len(mixer.directions), 4, mixer.num_weight_groups
    proxy = tokens @ mixer.to_proxy.weight.T + mixer.to_proxy.bias
    scan = (proxy @ mixer.to_scan.weight.T + mixer.to_scan.bias)[..., : d * (2 * p + 3 * g)]
    lam, u, weight = scan.split([d * p, d * p, 3 * d * g], dim=-1)
    y = line_scan(
        proxy.reshape(2, height, width, p),
        weight.reshape(2, height, width, d, g, 3),
        lam.reshape(2, height, width, d, p),
        u.reshape(2, height, width, d, p),
        directions=mixer.directions,
        chunk_size=mixer.chunk_size,
        backend="reference",
    )
    expected = y.reshape(2, height * width, d * p) @ mixer.to_out.weight.T + mixer.to_out.bias
    torch.testing.assert_close(mixer(tokens, height, width), expected)


def test_scan_inputs_are_aligned_views_and_the_result_is_not_copied():
    mixer = make_mixer(dim=64, proxy_dim=8)
    scan = torch.randn(2, 6, mixer.scan_dim)
    lam, u, weight = mixer._split_scan(scan, 2, 3)
    assert {t.untyped_storage().data_ptr() for t in (lam, u, weight)} == {scan.untyped_storage().data_ptr()}
    assert all(t.stride(-1) == 1 for t in (lam, u, weight))
    for gate in (lam, u):  # every pixel's and direction's channels begin at a multiple of 8 elements
        assert gate.storage_offset() % 8 == 0
        assert all(stride % 8 == 0 for stride in gate.stride()[:-1])
    assert weight.storage_offset() == u.storage_offset() + 4 * 8
    y = torch.randn(2, 2, 3, 4, 8)
    assert y.flatten(3).flatten(1, 2).data_ptr() == y.data_ptr()


def test_the_default_proxy_is_an_eighth():
    assert GSPN2Mixer(64).proxy_dim == 8
    assert GSPN2Mixer(4).proxy_dim == 1


def test_zero_output_gate_leaves_the_bias_only():
    mixer = make_mixer().double()
    with torch.no_grad():
        mixer.to_scan.weight[16:32] = 0  # u: D * P = 16 features after lam's 16
        mixer.to_scan.bias[16:32] = 0
    out = mixer(torch.randn(2, 12, 16, dtype=torch.float64), 3, 4)
    torch.testing.assert_close(out, mixer.to_out.bias.expand_as(out))


def test_a_fresh_mixer_mixes_every_token_into_every_other():
    torch.manual_seed(0)
    mixer = GSPN2Mixer(8, 2, backend="reference").double()
    tokens = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    for target in range(12):
        (grad,) = torch.autograd.grad(mixer(tokens, 3, 4)[0, target].sum(), tokens)
        assert (grad[0].abs().amax(-1) > 1e-12).all(), target


def test_chunks_stop_the_scan():
    mixer = make_mixer(directions=("down",), chunk_size=2)
    tokens = torch.randn(1, 12, 16)
    changed = tokens.clone()
    changed[:, :6] += 1  # rows 0 and 1: the first chunk of 4 rows of 3
    before, after = mixer(tokens, 4, 3), mixer(changed, 4, 3)
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.allclose(before[:, :6], after[:, :6])


def _swap_features(mixer: GSPN2Mixer, order: list[int], mirror: list[int]) -> GSPN2Mixer:
    """The mixer with its directions reordered, and the outer neighbours exchanged where ``mirror`` says."""
    d, p = 4, mixer.proxy_dim
    index = torch.arange(mixer.scan_dim)
    lam, u = index[: d * p].view(d, p), index[d * p : 2 * d * p].view(d, p)
    weight = index[2 * d * p : 2 * d * p + 3 * d].view(d, 3)[order].clone()
    for direction in mirror:
        weight[direction] = weight[direction].flip(0)
    rest = index[2 * d * p + 3 * d :]
    moved = torch.cat([lam[order].flatten(), u[order].flatten(), weight.flatten(), rest])
    other = make_mixer().double()
    other.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        other.to_scan.weight.copy_(mixer.to_scan.weight[moved])
        other.to_scan.bias.copy_(mixer.to_scan.bias[moved])
        columns = torch.arange(d * p).view(d, p)[order].flatten()
        other.to_out.weight.copy_(mixer.to_out.weight[:, columns])
    return other


@pytest.mark.parametrize(
    ("flip", "order", "mirror"),
    [(2, [0, 1, 3, 2], [0, 1]), (1, [1, 0, 2, 3], [2, 3])],
    ids=["left-right", "up-down"],
)
def test_flipping_the_picture_swaps_the_roles_of_the_directions(flip, order, mirror):
    mixer = make_mixer().double()
    swapped = _swap_features(mixer, order, mirror)
    picture = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    flipped = picture.flip(flip).flatten(1, 2)
    out = mixer(picture.flatten(1, 2), 3, 5).unflatten(1, (3, 5))
    torch.testing.assert_close(swapped(flipped, 3, 5).unflatten(1, (3, 5)), out.flip(flip))
    assert not torch.allclose(mixer(flipped, 3, 5).unflatten(1, (3, 5)), out.flip(flip), atol=1e-2)


def test_long_rows_are_padded_to_128_bytes():
    """As torch.compile would pad them."""
    with torch.device("meta"):
        assert [GSPN2Mixer(dim).scan_dim for dim in (384, 640, 1152, 2240)] == [400, 656, 1216, 2304]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [384, 1152])
def test_a_compiled_mixer_copies_nothing(dim):
    """Three matrix products and a scan."""
    from torch._inductor.utils import run_and_get_code

    mixer = GSPN2Mixer(dim, backend="cupy").to("cuda", torch.bfloat16)
    tokens = torch.randn(1, 64 * 64, dim, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(mixer, fullgraph=True), tokens, 64, 64)
    assert codes
    assert not any("triton_" in line and ".run(" in line for code in codes for line in code.splitlines())


def test_transposing_the_picture_swaps_rows_and_columns():
    mixer = make_mixer().double()
    swapped = _swap_features(mixer, [2, 3, 0, 1], [])
    picture = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    out = mixer(picture.flatten(1, 2), 3, 5).unflatten(1, (3, 5))
    transposed = swapped(picture.transpose(1, 2).flatten(1, 2), 5, 3).unflatten(1, (5, 3))
    torch.testing.assert_close(transposed, out.transpose(1, 2))


def test_every_feature_that_is_read_gets_a_gradient():
    mixer = make_mixer()
    tokens = torch.randn(2, 20, 16, requires_grad=True)
    mixer(tokens, 4, 5).square().sum().backward()
    used = 4 * (2 * 4 + 3)
    assert (tokens.grad != 0).all()
    assert (mixer.to_scan.weight.grad[:used] != 0).all()
    assert (mixer.to_scan.weight.grad[used:] == 0).all()
    for linear in (mixer.to_proxy, mixer.to_out):
        assert (linear.weight.grad != 0).all()


def test_gradients_are_right():
    mixer = make_mixer(dim=4, proxy_dim=2).double()
    tokens = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: mixer(t, 2, 3), (tokens,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    mixer = make_mixer()
    tokens = torch.randn(2, 20, 16)
    expected = mixer(tokens, 4, 5)
    out = mixer.to(dtype)(tokens.to(dtype), 4, 5)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < (0.03 if dtype == torch.bfloat16 else 0.005) * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be"),
        ({"dim": 16, "proxy_dim": 0}, "proxy_dim must be"),
        ({"dim": 16, "proxy_dim": 6, "num_weight_groups": 4}, "must divide proxy_dim"),
        ({"dim": 16, "num_weight_groups": 0}, "num_weight_groups must be"),
        ({"dim": 16, "chunk_size": 0}, "chunk_size must be"),
        ({"dim": 16, "directions": ()}, "directions must be"),
        ({"dim": 16, "directions": "down"}, "directions must be"),
        ({"dim": 16, "directions": ("down", "down")}, "directions must be"),
        ({"dim": 16, "directions": ("north",)}, "directions must be"),
        ({"dim": 16, "backend": "triton"}, "backend must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GSPN2Mixer(**options)


@pytest.mark.parametrize(
    ("shape", "height", "width", "message"),
    [
        ((2, 12, 16), 3, 5, r"height \* width must equal.*3 \* 5 for 12"),
        ((2, 12, 16), -3, -4, r"height \* width must equal"),
        ((2, 12, 8), 3, 4, r"hidden_states must be \(B, H\*W, 16\)"),
        ((12, 16), 3, 4, "hidden_states must be"),
    ],
)
def test_bad_grids_are_named(shape, height, width, message):
    with pytest.raises(ValueError, match=message):
        make_mixer()(torch.randn(shape), height, width)
