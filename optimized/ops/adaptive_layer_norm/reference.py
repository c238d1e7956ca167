"""Adaptive LayerNorm (AF3 Algorithm 26) in plain PyTorch: the definition that the kernels are checked against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def adaptive_layer_norm_reference(
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """sigmoid(w_scale · n + b_scale) ⊙ LN(a) + w_shift · n with n = norm_weight ⊙ LN(s), in the dtype of `a`.

    a `[..., c_a]`; s `[..., c_s]`, broadcast over leading axes of a; norm_weight `[c_s]`; w_scale and w_shift
    `[c_a, c_s]`; b_scale `[c_a]`. The norm of a has no parameters, that of s no offset.
    """
    dtype = a.dtype
    n = F.layer_norm(s.to(dtype), s.shape[-1:], norm_weight.to(dtype), None, eps)
    scale = torch.sigmoid(F.linear(n, w_scale.to(dtype), b_scale.to(dtype)))
    return scale * F.layer_norm(a, a.shape[-1:], None, None, eps) + F.linear(n, w_shift.to(dtype))
