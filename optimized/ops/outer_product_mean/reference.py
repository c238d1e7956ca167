"""Outer product mean (AF3 Algorithm 9) in plain PyTorch: the definition that the kernels are checked against."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class OuterWeights(NamedTuple):
    """Parameters of one outer product mean; c_m channels of the MSA, c hidden, c_z of the pair."""

    norm_weight: Tensor
    """`[c_m]`, and so is norm_bias."""
    norm_bias: Tensor
    a: Tensor
    """`[c, c_m]`, and so is b."""
    b: Tensor
    out: Tensor
    """`[c_z, c·c]`"""
    out_bias: Tensor
    """`[c_z]`"""


def projected_outer_reference(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """scale_ij (weight · vec(Σ_s a_si ⊗ b_sj) + bias) `[I, J, c_z]`, products in the dtype of `a`.

    a `[S, I, c]`; b `[S, J, d]`; weight `[c_z, c·d]`, d fastest; bias `[c_z]`; scale `[I, J]`.
    """
    dtype = a.dtype
    outer = torch.einsum("sic,sjd->ijcd", a, b.to(dtype)).flatten(-2)
    return F.linear(outer, weight.to(dtype), bias.to(dtype)) * scale.to(dtype).unsqueeze(-1)


def rows_present(mask: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 / (eps + rows in which both tokens are present) `[N, N]` in `dtype` from a boolean mask `[S, N]`; no gradient.

    The counts are integers up to the depth of the alignment, which bf16 would round.
    """
    with torch.autocast("cpu" if mask.device.type == "meta" else mask.device.type, enabled=False):
        rows = mask.to(dtype)
        return 1.0 / (eps + rows.transpose(0, 1) @ rows)


def outer_product_mean_reference(
    m: Tensor, mask: Tensor, weights: OuterWeights, norm_eps: float = 1e-5, eps: float = 1e-3
) -> Tensor:
    """The update of the pair representation `[N, N, c_z]` from m `[S, N, c_m]` and mask `[S, N]`, True = keep.

    weights.out · vec(Σ_s a_si ⊗ b_sj) + out_bias over (eps + rows in which both tokens are present), with a and b
    linear in LN(m) and zero where the mask is False; products in the dtype of `m`.
    """
    dtype = m.dtype
    w = OuterWeights(*(t.to(dtype) for t in weights))
    n = F.layer_norm(m, m.shape[-1:], w.norm_weight, w.norm_bias, norm_eps)
    present, wide = mask.unsqueeze(-1), torch.promote_types(dtype, torch.float32)
    a, b = F.linear(n, w.a) * present, F.linear(n, w.b) * present
    return projected_outer_reference(a, b, w.out, w.out_bias, rows_present(mask, eps, wide))
