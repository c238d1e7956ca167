"""Outer product mean as a differentiable operator."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops import layer_norm_linear as linear_op
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.outer_product_mean.reference import (
    OuterWeights,
    outer_product_mean_reference,
    projected_outer_reference,
    rows_present,
)
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

MAX_CHANNELS = 256


def outer_supported(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Supported:
    """Whether the kernels of `projected_outer` take these tensors, and if not, why."""
    verdict = triton_support(a, b, weight, bias, scale)
    if not verdict.ok:
        return verdict
    if weight.shape[0] > MAX_CHANNELS:
        return Supported(
            False, f"{weight.shape[0]} pair channels; the kernels hold at most {MAX_CHANNELS} per token pair"
        )
    return Supported(False, "the input is empty") if a.numel() == 0 or b.numel() == 0 else Supported(True)


def supported(m: Tensor, mask: Tensor, weights: OuterWeights) -> Supported:
    """Whether the kernels of `outer_product_mean` take these tensors, and if not, why."""
    verdict = linear_op.supported(m, weights.norm_weight, weights.norm_bias, [weights.a, weights.b])
    if not verdict.ok:
        return verdict
    if mask.device != m.device:
        return Supported(False, f"the mask is on {mask.device}, m on {m.device}")
    return outer_supported(m, m, weights.out, weights.out_bias, m)


def outer_product_mean(
    m: Tensor, mask: Tensor, weights: OuterWeights, norm_eps: float = 1e-5, eps: float = 1e-3
) -> Tensor:
    """AF3 Algorithm 9: the pair update `[N, N, c_z]` from m `[S, N, c_m]` and a boolean mask `[S, N]`, True = keep.

    The mean over rows s of the outer products of two projections of LN(m), projected to the pair's channels; the
    mean is over rows in which both tokens are present (plus `eps`). The products run in autocast's dtype where
    autocast is on and in m's dtype otherwise, and so is the result; parameters may have another dtype. The c²-wide
    outer products exist for a block of tokens at a time (32 MiB forward, 160 MiB backward) and are computed again in
    the backward pass. Where the kernels do not apply (`supported` says why) the definition runs.
    """
    dtype = compute_dtype(m)
    if not supported(m, mask, weights).ok:
        return outer_product_mean_reference(m.to(dtype), mask, weights, norm_eps, eps)
    norm = weights.norm_weight, weights.norm_bias
    present = mask.unsqueeze(-1)
    a, b = (
        x * present for x in linear_op.layer_norm_linear(m, *norm, [weights.a, weights.b], None, norm_eps)
    )
    return projected_outer(a, b, weights.out, weights.out_bias, rows_present(mask, eps))


def projected_outer(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """scale_ij (weight · vec(Σ_s a_si ⊗ b_sj) + bias) `[I, J, c_z]` in the dtype of `a`, differentiable but for scale.

    a `[S, I, c]` and b `[S, J, d]` of one dtype; weight `[c_z, c·d]`, d fastest; bias `[c_z]`; scale `[I, J]`. I and
    J may differ: a shard of rows i needs only its own a. Where the kernels do not apply the definition runs.
    """
    if not outer_supported(a, b, weight, bias, scale).ok:
        return projected_outer_reference(a, b, weight, bias, scale)
    if direct((a, b, weight, bias, scale)):
        return _Direct.apply(a, b.to(a.dtype), weight, bias, scale)
    return torch.ops.megafold_bench.projected_outer(a, b.to(a.dtype), weight, bias, scale)


@planned
def _forward(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    from optimized.ops.outer_product_mean import launch

    return launch.forward(a.contiguous(), b.contiguous(), weight, bias, scale.contiguous())


_forward_op = torch.library.custom_op("megafold_bench::projected_outer", mutates_args=())(_forward)


@_forward_op.register_fake
def _(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return a.new_empty((a.shape[1], b.shape[1], weight.shape[0]))


@planned
def _backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from optimized.ops.outer_product_mean import launch

    return launch.backward(dout.contiguous(), a.contiguous(), b.contiguous(), weight, scale.contiguous())


_backward_op = torch.library.custom_op("megafold_bench::projected_outer_backward", mutates_args=())(_backward)


@_backward_op.register_fake
def _(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    full = torch.float32
    return (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        weight.new_empty(weight.shape, dtype=full),
        weight.new_empty(weight.shape[0], dtype=full),
    )


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, b, weight, bias, scale = inputs
    ctx.save_for_backward(a, b, weight, scale)
    ctx.bias = bias.dtype


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    a, b, weight, scale = ctx.saved_tensors
    da, db, dw, d_bias = same_way(ctx, _backward, torch.ops.megafold_bench.projected_outer_backward)(
        dout, a, b, weight, scale
    )
    return da, db, dw.to(weight.dtype), d_bias.to(ctx.bias), None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
