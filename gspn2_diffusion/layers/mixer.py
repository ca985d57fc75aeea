"""GSPN2Mixer: the four-direction line scan between two projections (arXiv 2512.07884, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gspn2_diffusion.ops.line_scan import BACKENDS, DIRECTIONS, line_scan

# Rows of the scan projection are padded to a multiple of this many features: 16 bytes in half precision, so
# that every pixel's lam and u can be read as 16-byte vectors and the matrix product stays on tensor cores.
# torch.compile pads rows of more than 1,024 elements to 128 bytes by itself, after which it would copy every
# view of them; rows that are padded already stay in place.
_ROW_MULTIPLE, _LONG_ROW, _LONG_ROW_MULTIPLE = 8, 1024, 64


def check_scan_backend(backend: str) -> str:
    """Return ``backend``, or raise ValueError when it is none of ``line_scan``'s backends."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}.")
    return backend


def check_grid(hidden_states: torch.Tensor, dim: int, height: int, width: int) -> None:
    """Raise ValueError unless ``hidden_states`` is ``(B, height*width, dim)``."""
    if hidden_states.ndim != 3 or hidden_states.shape[-1] != dim:
        raise ValueError(f"hidden_states must be (B, H*W, {dim}), got {tuple(hidden_states.shape)}.")
    if height < 1 or width < 1 or height * width != hidden_states.shape[1]:
        raise ValueError(
            f"height * width must equal the number of tokens in hidden_states: "
            f"got {height} * {width} for {hidden_states.shape[1]} tokens."
        )


class GSPN2Mixer(nn.Module):
    """Token mixing by line scans over a few proxy channels, linear in the number of tokens.

    Tokens are projected to ``proxy_dim`` channels; one projection of those makes ``lam``, ``u`` and the raw
    three-neighbour weights of every direction; :func:`~gspn2_diffusion.line_scan` runs all directions; the
    output projection merges them. Everything stays channels-last, so lam, u and weight are strided views of
    one tensor and the scan's result is flattened without a copy. No positional embedding: a scan knows
    where a line begins.

    Feature layout of ``to_scan``: ``lam (D, P) | u (D, P) | weight (D, G, 3) | padding``. The padding (at
    most 7 features, 63 of more than 1,024; initialised to zero and never read) keeps rows at a multiple of
    16 bytes in half precision, long ones of 128.

    Initialisation: lam's bias is 1/4, u's is 1 and the weights' raw bias is 0 (one third for each
    neighbour). A fresh mixer is then close to a plain blurring scan; lam is below 1 because a scan sums
    along up to ``max(height, width)`` lines, and 1/4 keeps the output near unit size for noise (standard
    deviation 0.7 at 16x16 tokens, 1.3 at 64x64) and below 11 for smooth pictures.

    Args:
        dim: channels of the tokens.
        proxy_dim: channels P in which the scan runs; ``max(1, dim // 8)`` by default (the paper's ratio for
            text-to-image).
        num_weight_groups: G, the weight sets per direction; 1 is GSPN-2, ``proxy_dim`` is GSPN-1.
        chunk_size: restart the scan every so many lines (GSPN-local); None scans the whole picture.
        directions: a non-empty choice, without repeats, of "down", "up", "right", "left".
        bias: give the three projections a bias. Without it lam, u and weight start from zero-mean values.
        backend: "auto", "cupy" or "reference", see :func:`~gspn2_diffusion.line_scan`. May be set later.

    Attributes:
        direction_scale: ``(D * P,)`` factors of the directions' results before the output projection, or None
            for none; what balances scans at other sizes than that of training sets it for a while.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        proxy_dim: int | None = None,
        num_weight_groups: int = 1,
        chunk_size: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        proxy_dim = max(1, dim // 8) if proxy_dim is None else proxy_dim
        _check_arguments(dim, proxy_dim, num_weight_groups, chunk_size, directions)
        self.dim = dim
        self.proxy_dim = proxy_dim
        self.num_weight_groups = num_weight_groups
        self.chunk_size = chunk_size
        self.directions = tuple(directions)
        self.backend = check_scan_backend(backend)
        self.direction_scale: torch.Tensor | None = None

        self.to_proxy = nn.Linear(dim, proxy_dim, bias=bias)
        self.to_scan = nn.Linear(proxy_dim, self.scan_dim, bias=bias)
        self.to_out = nn.Linear(len(self.directions) * proxy_dim, dim, bias=bias)
        self.reset_parameters()

    @property
    def scan_dim(self) -> int:
        """Output features of ``to_scan``: ``D * (2*P + 3*G)`` and the padding."""
        used = len(self.directions) * (2 * self.proxy_dim + 3 * self.num_weight_groups)
        multiple = _ROW_MULTIPLE if used <= _LONG_ROW else _LONG_ROW_MULTIPLE
        return -(-used // multiple) * multiple

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as described in the class docstring."""
        count = len(self.directions) * self.proxy_dim
        used = 2 * count + 3 * len(self.directions) * self.num_weight_groups
        for linear in (self.to_proxy, self.to_scan, self.to_out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.to_scan.weight[:count] *= 0.25
        self.to_scan.weight[used:] = 0.0
        if self.to_scan.bias is not None:
            self.to_scan.bias[:count] = 0.25
            self.to_scan.bias[count : 2 * count] = 1.0

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Mix ``hidden_states (B, height*width, dim)``; returns the same shape and dtype.

        Raises:
            ValueError: ``hidden_states`` has another shape than ``height``, ``width`` and ``dim`` say.
        """
        check_grid(hidden_states, self.dim, height, width)
        proxy = self.to_proxy(hidden_states)  # (B, H*W, P)
        lam, u, weight = self._split_scan(self.to_scan(proxy), height, width)
        y = line_scan(
            proxy.unflatten(1, (height, width)),  # (B, H, W, P)
            weight,
            lam,
            u,
            directions=self.directions,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )  # (B, H, W, D, P)
        return self.merge(y.flatten(3).flatten(1, 2))  # (B, H*W, dim)

    def merge(self, y: torch.Tensor) -> torch.Tensor:
        """The directions' results ``(..., D*P)`` to ``(..., dim)``."""
        if self.direction_scale is not None:
            y = y * self.direction_scale.to(y.device, y.dtype)
        merged: torch.Tensor = self.to_out(y)
        return merged

    def _split_scan(
        self, scan: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """lam and u ``(B, H, W, D, P)`` and weight ``(B, H, W, D, G, 3)`` as views of ``scan``."""
        count = len(self.directions) * self.proxy_dim
        gates = (len(self.directions), self.proxy_dim)
        taps = (len(self.directions), self.num_weight_groups, 3)
        sizes = (count, count, taps[0] * taps[1] * 3)
        # Split at once: the gradients of the parts are then put together at once, too.
        lam, u, weight, _ = scan.unflatten(1, (height, width)).split((*sizes, self.scan_dim - sum(sizes)), -1)
        return lam.unflatten(-1, gates), u.unflatten(-1, gates), weight.unflatten(-1, taps)

    def extra_repr(self) -> str:
        return (
            f"directions={self.directions}, num_weight_groups={self.num_weight_groups}, "
            f"chunk_size={self.chunk_size}, backend={self.backend!r}"
        )


def _check_arguments(
    dim: int, proxy_dim: int, num_weight_groups: int, chunk_size: int | None, directions: Sequence[str]
) -> None:
    for name, value in (("dim", dim), ("proxy_dim", proxy_dim), ("num_weight_groups", num_weight_groups)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if proxy_dim % num_weight_groups:
        raise ValueError(
            f"num_weight_groups must divide proxy_dim, got num_weight_groups={num_weight_groups} "
            f"for proxy_dim={proxy_dim}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}.")
    unknown = [name for name in directions if name not in DIRECTIONS]
    if isinstance(directions, str) or not directions or unknown or len(set(directions)) != len(directions):
        raise ValueError(
            f"directions must be a non-empty sequence of distinct names from {DIRECTIONS}, "
            f"got {directions!r}."
        )
