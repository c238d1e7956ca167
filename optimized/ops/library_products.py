"""Matrix products that stay with the vendor's library, on packed weights and with fp32 results where sums are long."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimized.ops.parameters import pack


def _ready(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return all(w.dtype == dtype and w.is_contiguous() for w in weights)


def _stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return pack(weights, dtype).view(-1, weights[0].shape[1])


def side_by_side(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """[x·w_0ᵀ, x·w_1ᵀ, …] `[rows, len·h]` from x `[rows, c]` and weights `[h, c]` of any dtype, in x's dtype.

    Weights that need conversion are packed in one launch and multiplied at once; the others are multiplied where
    they are, each into its columns.
    """
    if not _ready(weights, x.dtype):
        return torch.mm(x, _stacked(weights, x.dtype).t())
    if len(weights) == 1:
        return torch.mm(x, weights[0].t())
    height = weights[0].shape[0]
    out = torch.empty((x.shape[0], len(weights) * height), dtype=x.dtype, device=x.device)
    for index, w in enumerate(weights):
        torch.mm(x, w.t(), out=out.narrow(1, index * height, height))
    return out


def side_by_side_backward(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient Σ_t dy_t·w_t `[rows, c]` of `side_by_side` to its input, from dy `[rows, len·h]`, in dy's dtype."""
    if len(weights) == 1:
        return torch.mm(dy, weights[0].to(dy.dtype))
    if dy.dtype != torch.float32 or not _ready(weights, dy.dtype):
        return torch.mm(dy, _stacked(weights, dy.dtype))
    parts = dy.split(weights[0].shape[0], 1)
    out = torch.mm(parts[0], weights[0])
    for part, w in zip(parts[1:], weights[1:], strict=True):
        out.addmm_(part, w)
    return out


def weight_product(dy: Tensor, x: Tensor) -> Tensor:
    """dyᵀ·x `[h, c]` in fp32 from dy `[rows, h]` and x `[rows, c]` of one dtype: a sum over all rows, rounded once."""
    if dy.dtype == torch.float32:
        return torch.mm(dy.t(), x)
    if dy.is_cuda and torch.version.hip is None:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t().float(), x.float())
