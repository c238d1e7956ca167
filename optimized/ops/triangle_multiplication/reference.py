"""Triangle multiplication (AF3 Algorithms 12 and 13) in plain PyTorch: the definition."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.gated_output.reference import add_update_reference


class TriangleWeights(NamedTuple):
    """Parameters of one triangle multiplication; c channels, h hidden channels, no projection biases."""

    norm_in_weight: Tensor
    """`[c]`"""
    norm_in_bias: Tensor
    """`[c]`"""
    a_p: Tensor
    """`[h, c]` projection of the left edges."""
    a_g: Tensor
    """`[h, c]` their gate."""
    b_p: Tensor
    """`[h, c]` projection of the right edges."""
    b_g: Tensor
    """`[h, c]` their gate."""
    norm_out_weight: Tensor
    """`[h]`"""
    norm_out_bias: Tensor
    """`[h]`"""
    out: Tensor
    """`[c, h]` output projection."""
    g: Tensor
    """`[c, c]` output gate, applied to the normalised input."""


class JointWeights(NamedTuple):
    """As `TriangleWeights`, where one matrix holds the projections of the left edges over those of the right ones."""

    norm_in_weight: Tensor
    """`[c]`"""
    norm_in_bias: Tensor
    """`[c]`"""
    p: Tensor
    """`[2h, c]` a_p over b_p."""
    p_gate: Tensor
    """`[2h, c]` a_g over b_g."""
    norm_out_weight: Tensor
    """`[h]`"""
    norm_out_bias: Tensor
    """`[h]`"""
    out: Tensor
    """`[c, h]`"""
    g: Tensor
    """`[c, c]`"""

    def apart(self) -> TriangleWeights:
        """The same, each matrix a view of its half."""
        (a_p, b_p), (a_g, b_g) = self.p.chunk(2), self.p_gate.chunk(2)
        return TriangleWeights(*self[:2], a_p, a_g, b_p, b_g, *self[4:])


def triangle_multiplication_reference(
    z: Tensor,
    weights: TriangleWeights | JointWeights,
    outgoing: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """σ(g·LN(z)) ⊙ out·LN(Σ_k a ⊙ b): LN(z) in the dtype of `z`, every product in `dtype` (that of z).

    z `[N, N, c]`; mask `[N, N]` boolean, True = keep. a_ij = mask_ij · σ(a_g·LN(z_ij)) ⊙ a_p·LN(z_ij), b likewise.
    Outgoing: Σ_k a_ik ⊙ b_jk; incoming: Σ_k a_ki ⊙ b_kj. With `keep` its factors times that; with `residual` plus it.
    """
    dtype = dtype or z.dtype
    weights = weights.apart() if isinstance(weights, JointWeights) else weights
    gamma, beta = weights.norm_in_weight.to(z.dtype), weights.norm_in_bias.to(z.dtype)
    w = TriangleWeights(*(t.to(dtype) for t in weights))
    normed = F.layer_norm(z, z.shape[-1:], gamma, beta, eps).to(dtype)
    a = torch.sigmoid(F.linear(normed, w.a_g)) * F.linear(normed, w.a_p)
    b = torch.sigmoid(F.linear(normed, w.b_g)) * F.linear(normed, w.b_p)
    if mask is not None:
        a = a * mask[..., None].to(a.dtype)
        b = b * mask[..., None].to(b.dtype)
    x = torch.einsum("ikc,jkc->ijc" if outgoing else "kic,kjc->ijc", a, b)
    normed_x = F.layer_norm(x, x.shape[-1:], w.norm_out_weight, w.norm_out_bias, eps)
    y = torch.sigmoid(F.linear(normed, w.g)) * F.linear(normed_x, w.out)
    if residual is not None:
        return add_update_reference(residual, y, keep)
    return y if keep is None else y * keep.to(y.dtype)
