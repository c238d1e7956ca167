"""Conditioned transition as a differentiable operator."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm import op as adaptive_op
from optimized.ops.adaptive_layer_norm.op import as_rows
from optimized.ops.conditioned_transition.reference import (
    ConditionedWeights,
    conditioned_transition_reference,
)
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support


def supported(a: Tensor, s: Tensor, weights: ConditionedWeights) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = adaptive_op.supported(a, s, *weights[:4])
    return triton_support(a, *weights[4:]) if verdict.ok else verdict


def conditioned_transition(a: Tensor, s: Tensor, weights: ConditionedWeights, eps: float = 1e-5) -> Tensor:
    """AF3 Algorithm 25: sigmoid(w_gate · s + b_gate) ⊙ w_out · (swish(w_a · x) ⊙ w_b · x), x = AdaLN(a, s).

    a `[..., c_a]`; s `[..., c_s]` of the same leading axes or without the first ones, whose entries then share its
    projections. The products run in autocast's dtype where autocast is on and in a's dtype otherwise, and so is
    the result; parameters may have another dtype. Kept for the backward pass besides the inputs: the result, the
    two hidden projections and the three projections of s; everything elementwise is recomputed. Where the kernels
    do not apply (`supported` says why) the definition runs.
    """
    dtype = compute_dtype(a)
    if not supported(a, s, weights).ok:
        return conditioned_transition_reference(a.to(dtype), s, weights, eps)
    if direct((a, s, *weights)):
        return _Direct.apply(a, s, *weights, eps, dtype)[0]
    return torch.ops.megafold_bench.conditioned_transition(a, s, *weights, eps, dtype)[0]


@planned
def _forward(
    a: Tensor, s: Tensor, norm_weight: Tensor, scale: Tensor, scale_bias: Tensor, shift: Tensor,
    w_a: Tensor, w_b: Tensor, w_out: Tensor, gate: Tensor, gate_bias: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from optimized.ops.conditioned_transition import launch

    weights = ConditionedWeights(norm_weight, scale, scale_bias, shift, w_a, w_b, w_out, gate, gate_bias)
    saved = launch.forward(as_rows(a), as_rows(s), weights, eps, dtype)
    return saved.y.view(a.shape), saved.p, saved.u, saved.g


_forward_op = torch.library.custom_op("megafold_bench::conditioned_transition", mutates_args=())(_forward)


@_forward_op.register_fake
def _(
    a: Tensor, s: Tensor, norm_weight: Tensor, scale: Tensor, scale_bias: Tensor, shift: Tensor,
    w_a: Tensor, w_b: Tensor, w_out: Tensor, gate: Tensor, gate_bias: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels, period = a.shape[-1], s.numel() // s.shape[-1]
    return (
        a.new_empty(a.shape, dtype=dtype),
        a.new_empty((period, 2 * channels), dtype=dtype),
        a.new_empty((a.numel() // channels, 2 * w_a.shape[0]), dtype=dtype),
        a.new_empty((period, channels), dtype=dtype),
    )


@planned
def _backward(
    dy: Tensor, a: Tensor, s: Tensor, norm_weight: Tensor, scale: Tensor, scale_bias: Tensor, shift: Tensor,
    w_a: Tensor, w_b: Tensor, w_out: Tensor, gate: Tensor, gate_bias: Tensor,
    y: Tensor, p: Tensor, u: Tensor, g: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from optimized.ops.conditioned_transition import launch

    weights = ConditionedWeights(norm_weight, scale, scale_bias, shift, w_a, w_b, w_out, gate, gate_bias)
    saved = launch.Saved(as_rows(y), p, u, g)
    da, ds, *parameters = launch.backward(as_rows(dy), as_rows(a), as_rows(s), weights, saved, eps)
    d_norm, d_conditions, d_scale_bias, d_ab, d_out, d_gate, d_gate_bias = parameters
    return (
        da.view(a.shape), ds.view(s.shape),
        d_norm, d_conditions, d_scale_bias, d_ab, d_out, d_gate, d_gate_bias,
    )  # fmt: skip


_backward_op = torch.library.custom_op("megafold_bench::conditioned_transition_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    dy: Tensor, a: Tensor, s: Tensor, norm_weight: Tensor, scale: Tensor, scale_bias: Tensor, shift: Tensor,
    w_a: Tensor, w_b: Tensor, w_out: Tensor, gate: Tensor, gate_bias: Tensor,
    y: Tensor, p: Tensor, u: Tensor, g: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def full(*shape: int) -> Tensor:
        return a.new_empty(shape, dtype=torch.float32)

    c, cs, h = a.shape[-1], s.shape[-1], w_a.shape[0]
    return (
        a.new_empty(a.shape), s.new_empty(s.shape),
        full(cs), full(2 * c, cs), full(c), full(2 * h, c), full(c, h), full(c, cs), full(c),
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.eps = inputs[11]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    w = ConditionedWeights(*saved[2:11])
    da, ds, d_norm, d_conditions, d_scale_bias, d_ab, d_out, d_gate, d_gate_bias = same_way(
        ctx, _backward, torch.ops.megafold_bench.conditioned_transition_backward
    )(dy, *saved, ctx.eps)
    d_scale, d_shift = d_conditions.chunk(2)
    d_a, d_b = d_ab.chunk(2)
    found = ConditionedWeights(d_norm, d_scale, d_scale_bias, d_shift, d_a, d_b, d_out, d_gate, d_gate_bias)
    return da, ds, *(d.to(p.dtype) for d, p in zip(found, w, strict=True)), None, None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
