"""LayerNorm followed by several linear maps without biases, in plain PyTorch: the definition."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """[w · LN(x) for w in weights], and head_weight · LN(x) with its channels first.

    LN in the dtype of `x`, products and results in `dtype` (that of x when none is given).

    x `[..., c]`; norm_weight, norm_bias `[c]`; each weight `[h, c]`, giving `[..., h]`; head_weight `[heads, c]`,
    giving `[heads, ...]` (the pair bias of triangle attention), last in the list.
    """
    dtype = dtype or x.dtype
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps).to(dtype)
    results = [F.linear(normed, w.to(dtype)) for w in weights]
    if head_weight is not None:
        results.append(F.linear(normed, head_weight.to(dtype)).movedim(-1, 0).contiguous())
    return results
