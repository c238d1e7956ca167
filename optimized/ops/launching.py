"""Host side shared by the fused operators: compute dtype, weight copies, split counts, device checks."""

from functools import cache

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter."""
    return bool(triton.knobs.runtime.interpret)


def device_reason(*tensors: Tensor) -> str | None:
    """Why these tensors cannot go to a Triton kernel, or None."""
    device = tensors[0].device
    if any(t.device != device for t in tensors):
        return "the tensors are on different devices"
    if device.type != "cuda" and not interpreting():
        return f"Triton kernels need a CUDA or ROCm device, the input is on {device.type}"
    odd = next((t.dtype for t in tensors if t.dtype not in FLOATS), None)
    return f"dtype {odd} is not one of float32, bfloat16, float16" if odd is not None else None


def fold(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of fp32 partial gradients over their leading dimension, in the parameter's dtype."""
    return partial.sum(0).to(dtype)


def packed(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights `[h, c]` of one shape stacked into one contiguous `[len·h, c]` tensor of `dtype`, in one launch."""
    height, width = weights[0].shape
    whole = torch.empty((len(weights) * height, width), dtype=dtype, device=weights[0].device)
    torch._foreach_copy_(list(whole.split(height)), weights)
    return whole
