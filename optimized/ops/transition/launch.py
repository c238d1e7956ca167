"""Launches of the transition kernels: tile shapes, grids and workspaces."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from optimized.ops.launching import fold, in_dtype, processors
from optimized.ops.transition import kernels


@dataclass(frozen=True)
class Tile:
    """Rows and hidden units per step, warps per program, software-pipelining depth."""

    rows: int
    hidden: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Tile shapes of the three kernels."""

    forward: Tile
    input_gradient: Tile
    weight_gradient: Tile


HALF_SMALL = Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
HALF_WIDE = Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1))
FULL = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1))
FULL_WIDE = Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))


def tiles(channels: int, dtype: torch.dtype) -> Tiles:
    """The tile shapes for a channel count and compute dtype."""
    if dtype == torch.float32:
        return FULL if channels <= 128 else FULL_WIDE
    return HALF_SMALL if channels <= 128 else HALF_WIDE


def forward(
    x: Tensor, norm: tuple[Tensor, Tensor], weights: list[Tensor], eps: float, dtype: torch.dtype, tile: Tile | None = None
) -> Tensor:
    """y `[rows, c]` in `dtype` from x `[rows, c]`; `weights` are w_a, w_b, w_out in any dtype."""
    rows, channels = x.shape
    hidden = weights[0].shape[0]
    tile = tile or tiles(channels, dtype).forward
    w_a, w_b, w_out = in_dtype(weights, dtype)
    out = torch.empty((rows, channels), dtype=dtype, device=x.device)
    kernels.forward_kernel[(-(-rows // tile.rows),)](
        x,
        *norm,
        w_a,
        w_b,
        w_out,
        out,
        rows,
        eps,
        C=channels,
        H=hidden,
        BC=triton.next_power_of_2(channels),
        BM=tile.rows,
        BH=tile.hidden,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return out


def input_gradient(
    x: Tensor, norm: tuple[Tensor, Tensor], weights: list[Tensor], dy: Tensor, eps: float, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n = LN(x) in the weights' dtype, and the partial sums of dγ and dβ `[programs, 2, c]`."""
    rows, channels = x.shape
    dtype = weights[0].dtype
    tile = tile or tiles(channels, dtype).input_gradient
    programs = -(-rows // tile.rows)
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=dtype, device=x.device)
    shares = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    kernels.input_gradient_kernel[(programs,)](
        x,
        *norm,
        *weights,
        dy,
        dx,
        n,
        shares,
        rows,
        eps,
        C=channels,
        H=weights[0].shape[0],
        BC=triton.next_power_of_2(channels),
        BM=tile.rows,
        BH=tile.hidden,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return dx, n, shares


def weight_gradient(n: Tensor, weights: list[Tensor], dy: Tensor, tile: Tile | None = None) -> Tensor:
    """Partial weight gradients `[splits, 3·c·h]` in fp32: dw_a, dw_b, dw_out one after another."""
    rows, channels = n.shape
    hidden = weights[0].shape[0]
    tile = tile or tiles(channels, n.dtype).weight_gradient
    chunks = -(-hidden // tile.hidden)
    splits = max(1, min(processors(n.device) // chunks, -(-rows // tile.rows)))
    partial = torch.empty((splits, 3 * channels * hidden), dtype=torch.float32, device=n.device)
    kernels.weight_gradient_kernel[(chunks, splits)](
        n,
        dy,
        *weights,
        partial,
        rows,
        splits,
        C=channels,
        H=hidden,
        BC=triton.next_power_of_2(channels),
        BM=tile.rows,
        BH=tile.hidden,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return partial


def backward(
    dy: Tensor, x: Tensor, norm: tuple[Tensor, Tensor], weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, γ, β, w_a, w_b, w_out, each in the dtype of what it belongs to."""
    copies = in_dtype(weights, dy.dtype)
    dx, n, shares = input_gradient(x, norm, copies, dy, eps)
    partial = weight_gradient(n, copies, dy)
    size = weights[0].numel()
    whole = fold(partial, weights[0].dtype)
    scale = fold(shares, norm[0].dtype)
    w_a, w_b, w_out = weights
    return (
        dx,
        scale[0].clone(),
        scale[1].clone(),
        whole[:size].view(w_a.shape).clone(),
        whole[size : 2 * size].view(w_b.shape).clone(),
        whole[2 * size :].view(w_out.shape).clone(),
    )
