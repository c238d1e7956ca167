"""Scaled dot-product attention with an additive pair bias, the one form every attention here uses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.af3.config import Attention

MASKED = -1e9
"""Added to the logits of masked keys; finite, so that a row with every key masked stays finite."""

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""q, k, v and bias as `biased_attention` takes them, to what it returns."""

_BIAS_ALIGNMENT = 8


def key_mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the boolean `mask` keeps, `MASKED` elsewhere, in `dtype`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, MASKED)


def _aligned(bias: Tensor) -> Tensor:
    """`bias` [..., Q, K] laid out so that the memory-efficient CUDA kernel takes it.

    The kernel wants unit stride along K and every other stride a multiple of 8. PyTorch would repair a
    misaligned bias itself, but after expansion, which copies it once per batch entry.
    """
    missing = -bias.shape[-1] % _BIAS_ALIGNMENT
    if bias.is_cuda and missing:
        return F.pad(bias, (0, missing))[..., : bias.shape[-1]]
    return bias.contiguous()


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, implementation: Attention | AttentionFunction
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v.

    q [B, H, Q, d], k and v [B, H, K, d]; bias [H, Q, K], the same for every entry of the batch and never
    copied per entry. Returns [B, H, Q, d] in v's dtype. The softmax is taken in float32. A function as
    `implementation` is called with q, k, v and bias; variants put one on a module from outside.
    """
    if callable(implementation):
        return implementation(q, k, v, bias)
    if implementation == "sdpa":
        bias = _aligned(bias.to(q.dtype)).expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    precise = torch.promote_types(q.dtype, torch.float32)
    logits = torch.matmul(q, k.transpose(-1, -2)).to(precise) / math.sqrt(q.shape[-1])
    weights = torch.softmax(logits + bias, dim=-1)
    return torch.matmul(weights.to(v.dtype), v)
