"""Triangle attention as one differentiable operator, from z to the update or to the new z.

Forward: LayerNorm with all projections in one read of z, attention, then gate, projection, dropout and residual.
Kept for the backward pass: z, the attention's output and its log-sum-exp. q, k, v, the gate and the bias are made
again from z, at the cost of one more read of it: keeping them would take 4·N²·h·d values.
"""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm.op import as_rows
from optimized.ops.attention import operator as attention
from optimized.ops.gated_output import op as ending
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.layer_norm_linear import op as projections
from optimized.ops.parameters import gradient_dtype, unpacked
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support
from optimized.ops.triangle_attention.reference import (
    Orientation,
    TriangleAttentionWeights,
    bias_from_rows,
    bias_of_rows,
    from_rows,
    to_rows,
    triangle_attention_reference,
)

MAPS = 4


def supported(
    z: Tensor,
    weights: TriangleAttentionWeights,
    heads: int,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = projections.supported(z, *weights[:2], weights[2 : 2 + MAPS], weights.bias)
    if not verdict.ok:
        return verdict
    width = weights.q.shape[0] // heads
    if width not in attention.HEAD_DIMS:
        return Supported(False, f"head size {width} is not one of {', '.join(map(str, attention.HEAD_DIMS))}")
    if z.dim() < 3 or z.shape[-2] != z.shape[-3]:
        return Supported(False, f"a pair representation {list(z.shape)} that is not square")
    if mask is not None and (mask.device != z.device or mask.dtype != torch.bool):
        return Supported(False, f"a mask of {mask.dtype} on {mask.device}; it must be boolean, on {z.device}")
    verdict = triton_support(weights.out, *(t for t in (residual, keep) if t is not None))
    return verdict if not verdict.ok else ending.fits(z.shape, residual, keep)


def triangle_attention(
    z: Tensor,
    weights: TriangleAttentionWeights,
    heads: int,
    way: Orientation,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """residual + keep ⊙ triangle attention (AF3 Algorithms 14 and 15) of z `[*, N, N, c]`.

    `mask` `[*, N, N]` boolean says which keys z_ij take part; a row without any gives zero. `residual` `[*, N, N, c]`
    and `keep`, the factors of row- or column-shared dropout (no gradient), as for `gated_output`; with z itself as the
    residual its two gradients are added by the kernel. Products run in autocast's dtype where autocast is on and in z's
    otherwise; the result has that dtype, or the wider one of it and the residual's. Where the kernels do not apply
    (`supported` says why) the definition runs.
    """
    dtype = compute_dtype(z)
    if not supported(z, weights, heads, mask, residual, keep).ok:
        return triangle_attention_reference(z, weights, heads, way, mask, eps, residual, keep, dtype)
    call = (z, mask, residual, keep, *weights, heads, *way, eps, dtype)
    if direct(t for t in (z, mask, residual, keep, *weights) if t is not None):
        return _Direct.apply(*call)[0]
    return torch.ops.megafold_bench.triangle_attention(*call)[0]


def _keys(mask: Tensor | None, columns: bool) -> Tensor | None:
    return mask.transpose(-1, -2) if mask is not None and columns else mask


@planned
def _forward(
    z: Tensor, mask: Tensor | None, residual: Tensor | None, keep: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bias: Tensor, out: Tensor,
    heads: int, columns: bool, flipped: bool, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, and for the backward pass o `[*, N, N, h·d]`, the log-sum-exp `[*, rows, h, N]` and its rounding."""
    scale = (q.shape[0] // heads) ** -0.5
    parameters = (norm_weight, norm_bias, q, k, v, g, bias)
    qs, ks, vs, gate, pairs = projections.run_forward(z, parameters, MAPS, eps, dtype)
    qs, ks, vs = (to_rows(x, heads, columns) for x in (qs, ks, vs))
    keys = _keys(mask, columns)
    x, lse, rounding = attention.run_forward(
        qs, ks, vs, bias_of_rows(pairs, flipped), keys, scale, "ieee", attention.kept_dtype(dtype)
    )
    o = from_rows(x, columns)
    del qs, ks, vs, pairs
    return ending.run_forward(o, gate, out, residual, keep, dtype), o, lse, rounding


_op = torch.library.custom_op("megafold_bench::triangle_attention", mutates_args=())(_forward)


@_op.register_fake
def _(
    z: Tensor, mask: Tensor | None, residual: Tensor | None, keep: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bias: Tensor, out: Tensor,
    heads: int, columns: bool, flipped: bool, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    kind = dtype if residual is None else torch.promote_types(residual.dtype, dtype)
    *lead, rows, length, _ = z.shape
    return (
        z.new_empty((*z.shape[:-1], out.shape[0]), dtype=kind),
        z.new_empty((*z.shape[:-1], q.shape[0]), dtype=attention.kept_dtype(dtype)),
        z.new_empty((*lead, rows, heads, length), dtype=torch.float32),
        z.new_empty((*lead, rows, heads, length) if dtype == torch.float32 else (0,), dtype=torch.float32),
    )


@planned
def _backward(
    dy: Tensor, z: Tensor, mask: Tensor | None, keep: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bias: Tensor, out: Tensor,
    o: Tensor, lse: Tensor, rounding: Tensor, heads: int, columns: bool, flipped: bool, eps: float, dtype: torch.dtype,
    into_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dz, the gradients of γ, β, the maps and the bias's in one vector, and that of the output projection.

    `into_z`: z was the residual too, and dz is its whole gradient.
    """
    from optimized.ops.gated_output import launch

    parameters = (norm_weight, norm_bias, q, k, v, g, bias)
    scale = (q.shape[0] // heads) ** -0.5
    w = projections.packed(parameters, dtype)
    qs, ks, vs, gate, pairs = projections.run_forward(z, parameters, MAPS, eps, dtype, w)
    qs, ks, vs, x = (to_rows(t, heads, columns) for t in (qs, ks, vs, o))
    ends = (as_rows(dy), as_rows(o), as_rows(gate), out, keep, dy.shape, dtype)
    do, dg, d_out = launch.backward(*ends, spent=True)
    del gate, ends
    dx, keys = to_rows(do.view(o.shape), heads, columns), _keys(mask, columns)
    dq, dk, dv, d_pairs = attention.run_backward(
        dx, None, qs, ks, vs, bias_of_rows(pairs, flipped), keys, x, lse, rounding, scale, "ieee", True, True
    )
    del do, dx, qs, ks, vs, pairs
    grads = [from_rows(t, columns) for t in (dq, dk, dv)] + [dg, bias_from_rows(d_pairs, flipped)]
    dz, flat = projections.run_backward(grads, z, parameters, MAPS, eps, w, dy if into_z else None)
    return dz, flat, d_out


_backward_op = torch.library.custom_op("megafold_bench::triangle_attention_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    dy: Tensor, z: Tensor, mask: Tensor | None, keep: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, bias: Tensor, out: Tensor,
    o: Tensor, lse: Tensor, rounding: Tensor, heads: int, columns: bool, flipped: bool, eps: float, dtype: torch.dtype,
    into_z: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = (norm_weight, norm_bias, q, k, v, g, bias)
    size = sum(p.numel() for p in parameters)
    return (
        z.new_empty(z.shape),
        z.new_empty(size, dtype=gradient_dtype(parameters)),
        out.new_empty(out.shape, dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, mask, residual, keep, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, mask, keep, *rest[:8], *output[1:])
    ctx.settings = tuple(rest[8:13])
    ctx.residual = None if residual is None else residual.dtype
    ctx.into_z = residual is z


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 17
    saved = ctx.saved_tensors
    parameters = saved[3:10]
    backward = same_way(ctx, _backward, torch.ops.megafold_bench.triangle_attention_backward)
    dz, flat, d_out = backward(dy, *saved, *ctx.settings, ctx.into_z)
    d_residual = None if ctx.residual is None or ctx.into_z else dy.to(ctx.residual)
    d_out = d_out.to(saved[10].dtype)
    return dz, None, d_residual, None, *unpacked(flat, parameters), d_out, None, None, None, None, None


_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
