"""A linear layer in plain PyTorch: the definition."""

from torch import Tensor
from torch.nn import functional as F


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias from x `[..., c]`, weight `[h, c]` and bias `[h]`, giving `[..., h]`."""
    return F.linear(x, weight, bias)
