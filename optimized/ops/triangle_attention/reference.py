"""Triangle attention (AF3 Algorithms 14 and 15) in plain PyTorch: the definition."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.attention import reference as attention_reference
from optimized.ops.gated_output.reference import gated_output_reference
from optimized.ops.layer_norm_linear.reference import layer_norm_linear_reference


class TriangleAttentionWeights(NamedTuple):
    """Parameters of one triangle attention; c channels, h heads of width d, no biases."""

    norm_weight: Tensor
    """`[c]`"""
    norm_bias: Tensor
    """`[c]`"""
    q: Tensor
    """`[h·d, c]`, and so are k, v and g."""
    k: Tensor
    v: Tensor
    g: Tensor
    """The output gate."""
    bias: Tensor
    """`[h, c]`"""
    out: Tensor
    """`[c, h·d]`"""


class Orientation(NamedTuple):
    """Which way triangle attention runs over z."""

    columns: bool
    """Attend along the columns (ending node) instead of the rows."""
    flipped: bool
    """Query i and key k of a row read the bias at (k, i) instead of (i, k)."""


def to_rows(x: Tensor, heads: int, columns: bool) -> Tensor:
    """`[*, I, J, heads·d]` to `[*, rows, heads, length, d]`, a view."""
    x = x.unflatten(-1, (heads, -1))
    return (x.transpose(-4, -3) if columns else x).transpose(-3, -2)


def from_rows(x: Tensor, columns: bool) -> Tensor:
    """The inverse of `to_rows`."""
    x = x.transpose(-3, -2)
    return (x.transpose(-4, -3) if columns else x).flatten(-2)


def bias_of_rows(bias: Tensor, flipped: bool) -> Tensor:
    """`[heads, *, I, J]` to the attention's `[*, 1, heads, queries, keys]`, a view."""
    bias = bias.movedim(0, -3)
    return (bias.transpose(-1, -2) if flipped else bias).unsqueeze(-4)


def bias_from_rows(bias: Tensor, flipped: bool) -> Tensor:
    """The inverse of `bias_of_rows`."""
    bias = bias.squeeze(-4)
    return (bias.transpose(-1, -2) if flipped else bias).movedim(-3, 0)


def triangle_attention_reference(
    z: Tensor,
    weights: TriangleAttentionWeights,
    heads: int,
    way: Orientation,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + keep ⊙ out·(σ(g) ⊙ softmax(q·k / √d + bias)·v), all from LN(z); products in `dtype` (that of z).

    z `[*, I, J, c]` (I = J unless rows attend to a bias of their own size); mask `[*, I, J]` True = take part as key;
    residual `[*, I, J, c]`; keep broadcasts to it. A row without any key attends to nothing: zero.
    """
    projections = [weights.q, weights.k, weights.v, weights.g]
    q, k, v, g, bias = layer_norm_linear_reference(
        z, weights.norm_weight, weights.norm_bias, projections, weights.bias, eps, dtype or z.dtype
    )
    q, k, v = (to_rows(x, heads, way.columns) for x in (q, k, v))
    if mask is not None and way.columns:
        mask = mask.transpose(-1, -2)
    x = attention_reference.attention(q, k, v, bias_of_rows(bias, way.flipped), mask)
    return gated_output_reference(from_rows(x, way.columns), g, weights.out, residual, keep)
