"""Pair-weighted averaging (AF3 Algorithm 10) in plain PyTorch: the definition that the kernels are checked against."""

import torch
from torch import Tensor


def weighted_average_reference(v: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_j softmax_j(logits_hij) v_sjh `[S, I, H, d]`, the softmax in fp32 (fp64 for fp64), the product in v's dtype.

    v `[S, J, H, d]`; logits `[H, I, J]`; mask `[J]` boolean, True = keep. Without any key the result is zero.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        wide = wide.masked_fill(~mask, float("-inf"))
    top = wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
    exponential = torch.exp(wide - top)
    weights = exponential / exponential.sum(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    return torch.einsum("hij,sjhd->sihd", weights.to(v.dtype), v)
