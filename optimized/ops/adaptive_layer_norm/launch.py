"""Launches of the adaptive LayerNorm kernels and the matrix products between them."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from optimized.ops.adaptive_layer_norm import kernels
from optimized.ops.library_products import side_by_side, side_by_side_backward, weight_product

TILE = 4096
"""Elements a program holds: 32 fp32 values per thread of 4 warps and tile."""


class Blocks(NamedTuple):
    """How rows of one width are cut: channels, padded channels, rows per program."""

    C: int
    BC: int
    BM: int

    @staticmethod
    def of(channels: int, tile: int = TILE) -> "Blocks":
        """Rows of `channels` in programs of about `tile` elements."""
        padded = triton.next_power_of_2(channels)
        return Blocks(channels, padded, max(1, tile // padded))

    def programs(self, rows: int) -> int:
        """Programs for `rows` rows."""
        return int(triton.cdiv(rows, self.BM))


def norm(s: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight ⊙ LN(s) in `dtype` of s `[rows, c]`."""
    blocks = Blocks.of(s.shape[1])
    n = torch.empty(s.shape, dtype=dtype, device=s.device)
    kernels.norm_kernel[(blocks.programs(s.shape[0]),)](s, weight, n, s.shape[0], eps, **blocks._asdict())
    return n


def norm_backward(
    s: Tensor, weight: Tensor, dn: Tensor, extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds (plus `extra`), n = weight ⊙ LN(s) in dn's dtype, and the gradient of weight in fp32."""
    blocks = Blocks.of(s.shape[1])
    programs = blocks.programs(s.shape[0])
    ds, n = torch.empty_like(s), torch.empty_like(dn)
    shares = torch.empty((programs, s.shape[1]), dtype=torch.float32, device=s.device)
    kernels.norm_backward_kernel[(programs,)](
        s,
        weight,
        dn,
        dn if extra is None else extra,
        ds,
        n,
        shares,
        s.shape[0],
        eps,
        EXTRA=extra is not None,
        **blocks._asdict(),
    )
    return ds, n, shares.sum(0)


def conditions(
    s: Tensor, norm_weight: Tensor, weights: list[Tensor], eps: float, dtype: torch.dtype
) -> Tensor:
    """g and t side by side, `[period, 2·c_a]`; `weights` are w_scale and w_shift."""
    return side_by_side(norm(s, norm_weight, eps, dtype), weights)


def modulate(a: Tensor, p: Tensor, b_scale: Tensor, eps: float) -> Tensor:
    """y `[rows, c_a]` in p's dtype."""
    rows, channels = a.shape
    blocks = Blocks.of(channels)
    y = torch.empty((rows, channels), dtype=p.dtype, device=a.device)
    kernels.modulate_kernel[(blocks.programs(rows),)](
        a, p, b_scale, y, rows, p.shape[0], eps, **blocks._asdict()
    )
    return y


def modulate_backward(
    a: Tensor, p: Tensor, b_scale: Tensor, dy: Tensor, eps: float, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, dp, the gradient of b_scale in fp32, and y again (an empty tensor without `recompute`)."""
    period, channels = p.shape[0], a.shape[1]
    blocks = Blocks.of(channels, TILE // 2)
    programs = blocks.programs(period)
    da, dp = torch.empty_like(a), torch.empty_like(p)
    y = torch.empty(a.shape if recompute else (0,), dtype=p.dtype, device=a.device)
    shares = torch.empty((programs, channels), dtype=torch.float32, device=a.device)
    kernels.modulate_backward_kernel[(programs,)](
        a,
        p,
        b_scale,
        dy,
        da,
        y,
        dp,
        shares,
        period,
        a.shape[0] // period,
        eps,
        RECOMPUTE=recompute,
        **blocks._asdict(),
    )
    return da, dp, shares.sum(0), y


def conditions_backward(
    dp: Tensor, s: Tensor, norm_weight: Tensor, weights: list[Tensor], extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds (plus `extra`), and in fp32 the gradients of norm_weight and of w_scale and w_shift as `[2·c_a, c_s]`."""
    ds, n, d_norm = norm_backward(s, norm_weight, side_by_side_backward(dp, weights), extra, eps)
    return ds, d_norm, weight_product(dp, n)
