"""Launches of the LayerNorm + Linear kernels: tile shapes, grids and workspaces."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from optimized.ops.launching import fold, packed, processors
from optimized.ops.layer_norm_linear import kernels


@dataclass(frozen=True)
class Tile:
    """Rows and output channels per step, warps per program, software-pipelining depth."""

    rows: int
    channels: int
    warps: int
    stages: int


HALF = Tile(64, 64, 4, 2)
HALF_WIDE = Tile(32, 32, 8, 1)
FULL = Tile(32, 16, 4, 1)


def tiles(channels: int, dtype: torch.dtype) -> Tile:
    """The tile shape for an input width and compute dtype."""
    if dtype == torch.float32:
        return FULL
    return HALF if channels <= 128 else HALF_WIDE


def _blocks(channels: int, hidden: int, heads: int, count: int) -> dict[str, int]:
    return {
        "C": channels,
        "H": hidden,
        "HEADS": heads,
        "T": count,
        "BC": triton.next_power_of_2(channels),
        "BS": max(16, triton.next_power_of_2(max(heads, 1))),
    }


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    head: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> list[Tensor]:
    """The results `[rows, h]` of every weight, then `[heads, rows]` when there is a head weight."""
    rows, channels = x.shape
    hidden, heads = weights[0].shape[0], (head.shape[0] if head is not None else 0)
    tile = tile or tiles(channels, dtype)
    whole = packed(weights, dtype)
    outs = [torch.empty((rows, hidden), dtype=dtype, device=x.device) for _ in weights]
    narrow = torch.empty((heads, rows), dtype=dtype, device=x.device) if heads else outs[0]
    kernels.forward_kernel[(triton.cdiv(rows, tile.rows),)](
        x,
        *norm,
        whole,
        head.to(dtype) if head is not None else whole,
        *(outs + outs[:1] * (4 - len(outs))),
        narrow,
        rows,
        eps,
        BM=tile.rows,
        BN=tile.channels,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **_blocks(channels, hidden, heads, len(weights)),
    )
    return [*outs, narrow] if heads else outs


def input_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    whole: Tensor,
    head: Tensor | None,
    grads: list[Tensor],
    eps: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n = LN(x) in the weights' dtype, and partial sums of dγ and dβ `[programs, 2, c]`."""
    rows, channels = x.shape
    heads = head.shape[0] if head is not None else 0
    wide = grads[:-1] if heads else grads
    tile = tile or tiles(channels, whole.dtype)
    programs = triton.cdiv(rows, tile.rows)
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=whole.dtype, device=x.device)
    shares = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    kernels.input_gradient_kernel[(programs,)](
        x,
        *norm,
        whole,
        head if head is not None else whole,
        *(wide + wide[:1] * (4 - len(wide))),
        grads[-1],
        dx,
        n,
        shares,
        rows,
        eps,
        BM=tile.rows,
        BN=tile.channels,
        STAGES=tile.stages,
        num_warps=tile.warps,
        **_blocks(channels, wide[0].shape[1], heads, len(wide)),
    )
    return dx, n, shares


def weight_gradient(n: Tensor, grad: Tensor, tile: Tile | None = None) -> Tensor:
    """Partial dw `[splits, h, c]` in fp32 of one map from its gradient `[rows, h]` (any strides)."""
    rows, channels = n.shape
    hidden = grad.shape[1]
    tile = tile or tiles(channels, n.dtype)
    width = min(tile.channels, max(16, triton.next_power_of_2(hidden)))
    chunks = triton.cdiv(hidden, width)
    splits = max(1, min(2 * processors(n.device) // chunks, triton.cdiv(rows, tile.rows)))
    partial = torch.empty((splits, hidden, channels), dtype=torch.float32, device=n.device)
    kernels.weight_gradient_kernel[(chunks, splits)](
        n,
        grad,
        partial,
        rows,
        splits,
        grad.stride(0),
        grad.stride(1),
        C=channels,
        H=hidden,
        BC=triton.next_power_of_2(channels),
        BM=tile.rows,
        BN=width,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return partial


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    head: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Gradients of x, γ, β, the weights and the head weight, each in the dtype of what it belongs to."""
    dtype = grads[0].dtype
    narrow = head.to(dtype) if head is not None else None
    dx, n, shares = input_gradient(x, norm, packed(weights, dtype), narrow, grads, eps)
    scale = fold(shares, norm[0].dtype)
    results = [dx, scale[0].clone(), scale[1].clone()]
    results += [fold(weight_gradient(n, g), w.dtype) for g, w in zip(grads, weights, strict=False)]
    if head is not None:
        results.append(fold(weight_gradient(n, grads[-1].t()), head.dtype))
    return results
