"""The ends of an update in plain PyTorch: the definitions that the kernels are checked against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def add_update_reference(residual: Tensor, update: Tensor, keep: Tensor | None = None) -> Tensor:
    """residual + keep ⊙ update; `keep` (1 / (1 - p) or 0, one value for all of a shared axis) broadcasts.

    The product has the wider dtype of its two factors, the result that of residual and update.
    """
    total = residual + (update if keep is None else update * keep)
    return total.to(torch.promote_types(residual.dtype, update.dtype))


def gated_output_reference(
    x: Tensor, gate: Tensor, weight: Tensor, residual: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """residual + keep ⊙ weight · (sigmoid(gate) ⊙ x), the product in the dtype of `x`.

    x and gate `[..., h]`; weight `[c, h]`; residual `[..., c]`; keep broadcasts to `[..., c]`.
    """
    y = F.linear(torch.sigmoid(gate.to(x.dtype)) * x, weight.to(x.dtype))
    if residual is not None:
        return add_update_reference(residual, y, keep)
    return y if keep is None else y * keep.to(y.dtype)


def conditioned_output_reference(
    x: Tensor, gate: Tensor, weight: Tensor, s: Tensor, w_gate: Tensor, b_gate: Tensor
) -> Tensor:
    """sigmoid(w_gate · s + b_gate) ⊙ weight · (sigmoid(gate) ⊙ x), the products in the dtype of `x`.

    x and gate `[..., h]`; weight `[c, h]`; s `[..., c_s]`, broadcast over leading axes; w_gate `[c, c_s]`;
    b_gate `[c]`.
    """
    dtype = x.dtype
    outer = torch.sigmoid(F.linear(s.to(dtype), w_gate.to(dtype), b_gate.to(dtype)))
    return outer * gated_output_reference(x, gate, weight)
