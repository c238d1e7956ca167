"""Adaptive LayerNorm as a differentiable operator."""

import math
from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm.reference import adaptive_layer_norm_reference
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

MAX_CHANNELS = 2048


def period(a: Tensor, s: Tensor) -> int:
    """Rows of s when row r of a goes with row r mod period of s; 0 where s broadcasts in another way."""
    lead, own = tuple(a.shape[:-1]), list(s.shape[:-1])
    while own and own[0] == 1:
        own.pop(0)
    if len(own) > len(lead) or lead[len(lead) - len(own) :] != tuple(own):
        return 0
    return math.prod(own)


def supported(
    a: Tensor, s: Tensor, norm_weight: Tensor, w_scale: Tensor, b_scale: Tensor, w_shift: Tensor
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = triton_support(a, s, norm_weight, w_scale, b_scale, w_shift)
    if not verdict.ok:
        return verdict
    widest = max(a.shape[-1], s.shape[-1])
    if widest > MAX_CHANNELS:
        return Supported(False, f"{widest} channels; the kernels hold at most {MAX_CHANNELS} per row")
    if a.numel() == 0 or s.numel() == 0:
        return Supported(False, "the input is empty")
    if not period(a, s):
        return Supported(
            False, f"s {list(s.shape)} does not repeat along the leading axes of a {list(a.shape)}"
        )
    return Supported(True)


def adaptive_layer_norm(
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """AF3 Algorithm 26: sigmoid(w_scale · n + b_scale) ⊙ LN(a) + w_shift · n with n = norm_weight ⊙ LN(s).

    a `[..., c_a]`; s `[..., c_s]` of the same leading axes or without the first ones, whose entries then share its
    projections; norm_weight `[c_s]`; w_scale, w_shift `[c_a, c_s]`; b_scale `[c_a]`. The products run in autocast's
    dtype where autocast is on and in a's dtype otherwise, and so is the result; parameters may have another dtype.
    Kept for the backward pass: a, s, the parameters and the two projections of s. Where the kernels do not apply
    (`supported` says why) the definition runs.
    """
    parameters = (norm_weight, w_scale, b_scale, w_shift)
    dtype = compute_dtype(a)
    if not supported(a, s, *parameters).ok:
        return adaptive_layer_norm_reference(a.to(dtype), s, *parameters, eps)
    if direct((a, s, *parameters)):
        return _Direct.apply(a, s, *parameters, eps, dtype)[0]
    return torch.ops.megafold_bench.adaptive_layer_norm(a, s, *parameters, eps, dtype)[0]


def as_rows(x: Tensor) -> Tensor:
    """`[..., c]` as contiguous rows `[rows, c]`."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@planned
def _forward(
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from optimized.ops.adaptive_layer_norm import launch

    p = launch.conditions(as_rows(s), norm_weight, [w_scale, w_shift], eps, dtype)
    return launch.modulate(as_rows(a), p, b_scale, eps).view(a.shape), p


_forward_op = torch.library.custom_op("megafold_bench::adaptive_layer_norm", mutates_args=())(_forward)


@_forward_op.register_fake
def _(
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    p = a.new_empty((s.numel() // s.shape[-1], 2 * a.shape[-1]), dtype=dtype)
    return a.new_empty(a.shape, dtype=dtype), p


@planned
def _backward(
    dy: Tensor,
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    p: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from optimized.ops.adaptive_layer_norm import launch

    da, dp, d_bias, _ = launch.modulate_backward(as_rows(a), p, b_scale, as_rows(dy), eps, recompute=False)
    ds, d_norm, d_weights = launch.conditions_backward(
        dp, as_rows(s), norm_weight, [w_scale, w_shift], None, eps
    )
    return da.view(a.shape), ds.view(s.shape), d_norm, d_bias, d_weights


_backward_op = torch.library.custom_op("megafold_bench::adaptive_layer_norm_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    dy: Tensor,
    a: Tensor,
    s: Tensor,
    norm_weight: Tensor,
    w_scale: Tensor,
    b_scale: Tensor,
    w_shift: Tensor,
    p: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    full = torch.float32
    return (
        a.new_empty(a.shape),
        s.new_empty(s.shape),
        s.new_empty(s.shape[-1], dtype=full),
        a.new_empty(a.shape[-1], dtype=full),
        a.new_empty((2 * a.shape[-1], s.shape[-1]), dtype=full),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.eps = inputs[6]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _dp: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    saved = ctx.saved_tensors
    da, ds, d_norm, d_bias, d_weights = same_way(
        ctx, _backward, torch.ops.megafold_bench.adaptive_layer_norm_backward
    )(dy, *saved, ctx.eps)
    _, _, norm_weight, w_scale, b_scale, w_shift, _ = saved
    d_scale, d_shift = d_weights.to(w_scale.dtype).chunk(2)
    return (
        da,
        ds,
        d_norm.to(norm_weight.dtype),
        d_scale,
        d_bias.to(b_scale.dtype),
        d_shift.to(w_shift.dtype),
        None,
        None,
    )


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
