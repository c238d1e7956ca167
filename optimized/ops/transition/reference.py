"""Transition (AF3 Algorithm 11) in plain PyTorch: the definition that the kernels are checked against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def transition_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    added: bool = False,
) -> Tensor:
    """w_out · (swish(w_a · LN(x)) ⊙ w_b · LN(x)): LN in the dtype of `x`, every product in `dtype` (that of x).

    `added`: x plus that, in the wider of both dtypes.
    x `[..., c]`; norm_weight, norm_bias `[c]`; w_a, w_b `[h, c]`; w_out `[c, h]`, h = 4c in the paper.
    """
    dtype = dtype or x.dtype
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps).to(dtype)
    a = F.linear(normed, w_a.to(dtype))
    b = F.linear(normed, w_b.to(dtype))
    y = F.linear(F.silu(a) * b, w_out.to(dtype))
    return x + y if added else y
