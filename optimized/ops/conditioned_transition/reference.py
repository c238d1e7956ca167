"""Conditioned transition (AF3 Algorithm 25) in plain PyTorch: the definition that the kernels are checked against."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from optimized.ops.adaptive_layer_norm.reference import adaptive_layer_norm_reference


class ConditionedWeights(NamedTuple):
    """Parameters of one conditioned transition; c_a channels, conditioning of c_s, h hidden."""

    norm_weight: Tensor
    """`[c_s]`, scale of the norm of s."""
    scale: Tensor
    """`[c_a, c_s]`, and so is shift."""
    scale_bias: Tensor
    """`[c_a]`"""
    shift: Tensor
    a: Tensor
    """`[h, c_a]`, the branch through swish."""
    b: Tensor
    """`[h, c_a]`"""
    out: Tensor
    """`[c_a, h]`"""
    gate: Tensor
    """`[c_a, c_s]`"""
    gate_bias: Tensor
    """`[c_a]`"""


def conditioned_transition_reference(
    a: Tensor, s: Tensor, weights: ConditionedWeights, eps: float = 1e-5
) -> Tensor:
    """sigmoid(w_gate · s + b_gate) ⊙ w_out · (swish(w_a · x) ⊙ w_b · x), x = AdaLN(a, s), in the dtype of `a`.

    a `[..., c_a]`; s `[..., c_s]`, broadcast over leading axes of a.
    """
    dtype = a.dtype
    w = ConditionedWeights(*(t.to(dtype) for t in weights))
    s = s.to(dtype)
    x = adaptive_layer_norm_reference(a, s, *w[:4], eps)
    hidden = F.silu(F.linear(x, w.a)) * F.linear(x, w.b)
    return torch.sigmoid(F.linear(s, w.gate, w.gate_bias)) * F.linear(hidden, w.out)
