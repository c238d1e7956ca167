"""The linear layer in three TF32 products as a differentiable operator."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.library_products import weight_product
from optimized.ops.linear.reference import linear_reference
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

SMALLEST = 64
"""Channels on either side below which a product is too thin to be worth it."""


def supported(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Supported:
    """Whether the kernel takes these tensors, and if not, why."""
    verdict = triton_support(x, weight, *([] if bias is None else [bias]))
    if not verdict.ok:
        return verdict
    if compute_dtype(x) != torch.float32 or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return Supported(False, "only products of float32 are taken in three TF32 products")
    if torch.version.hip is not None:
        return Supported(False, "TF32 products exist on NVIDIA only")
    if min(weight.shape) < SMALLEST:
        return Supported(
            False, f"{min(weight.shape)} channels; from {SMALLEST} on tensor cores are worth the splitting"
        )
    return Supported(False, "the input is empty") if x.numel() == 0 else Supported(True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias with the products of float32 taken as three TF32 products each.

    So is the gradient of x; that of the weight is a product of the library in float32, which is faster there. x `[..., c]`, weight `[h, c]`, bias `[h]`, giving `[..., h]`. Errors are those of float32 products and some
    2⁻²³ of the terms more; infinities become NaN. Sums have a fixed order: results and gradients repeat bit for bit.
    Where the kernel does not apply (`supported` says why) the definition runs.
    """
    if not supported(x, weight, bias).ok:
        return linear_reference(x, weight, bias)
    if direct((x, weight) if bias is None else (x, weight, bias)):
        return _Direct.apply(x, weight, bias)
    return torch.ops.megafold_bench.linear_tf32x3(x, weight, bias)


def _rows(x: Tensor) -> Tensor:
    """`[..., c]` as `[rows, c]` with contiguous channels."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@planned
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from optimized.ops.linear import launch

    return launch.product(_rows(x), weight.contiguous(), bias).view(*x.shape[:-1], -1)


_forward_op = torch.library.custom_op("megafold_bench::linear_tf32x3", mutates_args=())(_forward)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@planned
def _backward(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor]:
    from optimized.ops.linear import launch

    rows = _rows(dy)
    # Turning the weight takes a few microseconds; reading it across its rows took the kernel half as long again.
    dx = launch.product(rows, weight.t().contiguous(), None).view(x.shape) if need_x else x.new_empty(0)
    return dx, weight_product(rows, _rows(x))


_backward_op = torch.library.custom_op("megafold_bench::linear_tf32x3_backward", mutates_args=())(_backward)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, need_bias = ctx.needs_input_grad
    run = same_way(ctx, _backward, torch.ops.megafold_bench.linear_tf32x3_backward)
    dx, d_weight = run(dy, *ctx.saved_tensors, need_x)
    d_bias = dy.flatten(0, -2).sum(0) if need_bias else None
    return dx if need_x else None, d_weight, d_bias


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
