"""Host side shared by the fused operators: compute dtype, weight copies, split counts, folds."""

from functools import cache

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where autocast is on, the input's otherwise."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def in_dtype(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights as contiguous tensors of `dtype`; those that must be converted are copied in one launch."""
    result = list(weights)
    slots = [k for k, w in enumerate(weights) if w.dtype != dtype or not w.is_contiguous()]
    if slots:
        copies = [torch.empty(weights[k].shape, dtype=dtype, device=weights[k].device) for k in slots]
        torch._foreach_copy_(copies, [weights[k] for k in slots])
        for k, copy in zip(slots, copies, strict=True):
            result[k] = copy
    return result


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of the device; 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def fold(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of fp32 partial gradients over their leading dimension, in the parameter's dtype."""
    return partial.sum(0).to(dtype)


def packed(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights `[h, c]` of one shape stacked into one contiguous `[len·h, c]` tensor of `dtype`, in one launch."""
    height, width = weights[0].shape
    whole = torch.empty((len(weights) * height, width), dtype=dtype, device=weights[0].device)
    torch._foreach_copy_(list(whole.split(height)), weights)
    return whole
