"""Gated output projection with an adaptive output gate, the end of conditioned attention, as an operator."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm.op import as_rows, period
from optimized.ops.gated_output.reference import conditioned_output_reference
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support


def conditioned_supported(
    x: Tensor, gate: Tensor, weight: Tensor, s: Tensor, w_gate: Tensor, b_gate: Tensor
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = triton_support(x, gate, weight, s, w_gate, b_gate)
    if not verdict.ok:
        return verdict
    if x.numel() == 0 or s.numel() == 0:
        return Supported(False, "the input is empty")
    if gate.shape != x.shape:
        return Supported(False, f"a gate {list(gate.shape)} for an input {list(x.shape)}")
    if not period(x, s):
        return Supported(
            False, f"s {list(s.shape)} does not repeat along the leading axes of x {list(x.shape)}"
        )
    return Supported(True)


def conditioned_output(
    x: Tensor, gate: Tensor, weight: Tensor, s: Tensor, w_gate: Tensor, b_gate: Tensor
) -> Tensor:
    """sigmoid(w_gate · s + b_gate) ⊙ weight · (sigmoid(gate) ⊙ x): the end of AF3 Algorithm 24 with conditioning.

    x and gate `[..., h]`; weight `[c, h]`; s `[..., c_s]` of the same leading axes or without the first ones, whose
    entries then share its projection; w_gate `[c, c_s]`; b_gate `[c]`. The products run in autocast's dtype where
    autocast is on and in x's dtype otherwise, and so is the result. Kept for the backward pass besides the inputs:
    the result and the projection of s. Where the kernels do not apply (`conditioned_supported` says why) the
    definition runs.
    """
    dtype = compute_dtype(x)
    if not conditioned_supported(x, gate, weight, s, w_gate, b_gate).ok:
        return conditioned_output_reference(x.to(dtype), gate, weight, s, w_gate, b_gate)
    if direct((x, gate, weight, s, w_gate, b_gate)):
        return _Direct.apply(x, gate, weight, s, w_gate, b_gate, dtype)[0]
    return torch.ops.megafold_bench.conditioned_output(x, gate, weight, s, w_gate, b_gate, dtype)[0]


@planned
def _forward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    s: Tensor,
    w_gate: Tensor,
    b_gate: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from optimized.ops.conditioned_transition import launch as conditioned
    from optimized.ops.gated_output import launch
    from optimized.ops.library_products import side_by_side

    o = side_by_side(launch.gate(as_rows(x), as_rows(gate), dtype), [weight])
    g = side_by_side(as_rows(s).to(dtype), [w_gate])
    return conditioned.gate(o, g, b_gate).view(*x.shape[:-1], weight.shape[0]), g


_forward_op = torch.library.custom_op("megafold_bench::conditioned_output", mutates_args=())(_forward)


@_forward_op.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    s: Tensor,
    w_gate: Tensor,
    b_gate: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    channels = weight.shape[0]
    g = x.new_empty((s.numel() // s.shape[-1], channels), dtype=dtype)
    return x.new_empty((*x.shape[:-1], channels), dtype=dtype), g


@planned
def _backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    s: Tensor,
    w_gate: Tensor,
    b_gate: Tensor,
    y: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from optimized.ops.conditioned_transition import launch as conditioned
    from optimized.ops.gated_output import launch
    from optimized.ops.library_products import side_by_side_backward, weight_product

    do, dg, d_bias = conditioned.gate_backward(as_rows(y), g, b_gate, as_rows(dy))
    dx, d_gate, gated = launch.gate_backward(as_rows(x), as_rows(gate), side_by_side_backward(do, [weight]))
    ds = side_by_side_backward(dg, [w_gate]).to(s.dtype)
    d_outer = weight_product(dg, as_rows(s).to(dg.dtype))
    return (
        dx.view(x.shape),
        d_gate.view(x.shape),
        weight_product(do, gated),
        ds.view(s.shape),
        d_outer,
        d_bias,
    )


_backward_op = torch.library.custom_op("megafold_bench::conditioned_output_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    s: Tensor,
    w_gate: Tensor,
    b_gate: Tensor,
    y: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    full = torch.float32
    return (
        x.new_empty(x.shape),
        gate.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=full),
        s.new_empty(s.shape),
        w_gate.new_empty(w_gate.shape, dtype=full),
        b_gate.new_empty(b_gate.shape, dtype=full),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _dg: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    saved = ctx.saved_tensors
    grads = same_way(ctx, _backward, torch.ops.megafold_bench.conditioned_output_backward)(dy, *saved)
    return *(d.to(t.dtype) for d, t in zip(grads, saved[:6], strict=True)), None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
