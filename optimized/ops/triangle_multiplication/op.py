"""Triangle multiplication as a differentiable operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm.op import as_rows
from optimized.ops.gated_output import op as ending
from optimized.ops.gated_output.launch import add
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.parameters import gradient_dtype, unpacked
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support
from optimized.ops.triangle_multiplication import launch, layout
from optimized.ops.triangle_multiplication.reference import (
    JointWeights,
    TriangleWeights,
    triangle_multiplication_reference,
)

MAX_CHANNELS = 256


def supported(
    z: Tensor,
    weights: TriangleWeights | JointWeights,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = triton_support(z, *weights, *(t for t in (residual, keep) if t is not None))
    if not verdict.ok:
        return verdict
    if z.dim() != 3 or z.shape[0] != z.shape[1] or z.numel() == 0:
        return Supported(
            False, f"the pair representation must be [N, N, c] with N > 0, it is {list(z.shape)}"
        )
    width = max(z.shape[-1], weights.out.shape[1])
    if width > MAX_CHANNELS:
        return Supported(
            False, f"{width} channels; the kernels hold at most {MAX_CHANNELS} per row on the chip"
        )
    if mask is not None and mask.dtype != torch.bool:
        return Supported(False, f"the mask must be boolean, it is {mask.dtype}")
    return ending.fits(z.shape, residual, keep)


def triangle_multiplication(
    z: Tensor,
    weights: TriangleWeights | JointWeights,
    outgoing: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """residual + keep ⊙ triangle multiplication (AF3 Algorithms 12, outgoing, and 13, incoming) of z `[N, N, c]`.

    z has a contiguous last dimension, otherwise any strides; mask `[N, N]` boolean, True = keep. `residual` `[N, N, c]`
    and `keep`, the factors of row- or column-shared dropout (no gradient), as for `gated_output`; with z itself as the
    residual its two gradients are added by the kernel. The products run in autocast's dtype where autocast is on and
    in z's dtype otherwise; the result has that dtype, or the wider one of it and the residual's. Parameters may have
    another dtype. z, the contraction (N²·h values) and, in bfloat16, five statistics of every pair
    are kept for the backward pass. Where the kernels do not apply (`supported` says why) the definition runs.
    """
    dtype = compute_dtype(z)
    if not supported(z, weights, mask, residual, keep).ok:
        return triangle_multiplication_reference(z, weights, outgoing, mask, eps, dtype, residual, keep)
    parameters: tuple[Tensor | None, ...] = weights
    if isinstance(weights, JointWeights):
        parameters = (*weights[:4], None, None, *weights[4:])
    call = (z, *parameters, mask, residual, keep, outgoing, eps, dtype)
    if direct(t for t in (z, *weights, mask, residual, keep) if t is not None):
        return _Direct.apply(*call)[0]
    return torch.ops.megafold_bench.triangle_multiplication(*call)[0]


def _in_order(flat: Tensor, parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients that `launch.backward` returns in one vector, in the order of the parameters.

    There a_p and b_p lie one after the other, and so do a_g and b_g: of joint matrices each two are one.
    """
    gamma, beta, a_p, a_g, b_p, b_g, gamma_out, beta_out, out, g = range(10)
    order = (gamma, beta, gamma_out, beta_out, a_p, b_p, a_g, b_g, out, g)
    there = [(index, t) for index in order if (t := parameters[index]) is not None]
    found: list[Tensor | None] = [None] * len(parameters)
    for (index, _), gradient in zip(there, unpacked(flat, [t for _, t in there]), strict=True):
        found[index] = gradient
    return found


def _named(
    norm_in_weight: Tensor, norm_in_bias: Tensor, a_p: Tensor, a_g: Tensor, b_p: Tensor | None, b_g: Tensor | None,
    norm_out_weight: Tensor, norm_out_bias: Tensor, out: Tensor, g: Tensor,
) -> TriangleWeights:  # fmt: skip
    """The parameters of a pass; without b_p and b_g those of a hold both."""
    ends = (norm_out_weight, norm_out_bias, out, g)
    if b_p is None or b_g is None:
        return JointWeights(norm_in_weight, norm_in_bias, a_p, a_g, *ends).apart()
    return TriangleWeights(norm_in_weight, norm_in_bias, a_p, a_g, b_p, b_g, *ends)


def _plain(z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return (z if z.stride(2) == 1 else z.contiguous()), (mask.contiguous() if mask is not None else None)


@planned
def _forward(
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    a_p: Tensor,
    a_g: Tensor,
    b_p: Tensor | None,
    b_g: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    out: Tensor,
    g: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    outgoing: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _named(norm_in_weight, norm_in_bias, a_p, a_g, b_p, b_g, norm_out_weight, norm_out_bias, out, g)
    z, mask = _plain(z, mask)
    y, x, stats = launch.forward(z, weights, mask, outgoing, eps, dtype)
    rows = None if residual is None else as_rows(residual)
    return add(rows, as_rows(y), keep, y.shape, _kind(residual, dtype)).view(y.shape), x, stats


def _kind(residual: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result."""
    return dtype if residual is None else torch.promote_types(residual.dtype, dtype)


_op = torch.library.custom_op("megafold_bench::triangle_multiplication", mutates_args=())(_forward)


@_op.register_fake
def _(
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    a_p: Tensor,
    a_g: Tensor,
    b_p: Tensor | None,
    b_g: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    out: Tensor,
    g: Tensor,
    mask: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    outgoing: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = layout.Shape.of(z, out.shape[1])
    x = z.new_empty((shape.hidden, shape.padded, shape.padded), dtype=dtype)
    y = z.new_empty(z.shape, dtype=_kind(residual, dtype))
    kept = layout.folds_output(z, shape.hidden, dtype)
    return y, x, z.new_empty(shape.statistics(kept), dtype=torch.float32)


@planned
def _backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    a_p: Tensor,
    a_g: Tensor,
    b_p: Tensor | None,
    b_g: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    out: Tensor,
    g: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    outgoing: bool,
    eps: float,
    into_z: bool,
) -> tuple[Tensor, Tensor]:
    """dz and the gradients of the parameters in one vector. `into_z`: z was the residual too, and dz is its whole gradient."""
    weights = _named(norm_in_weight, norm_in_bias, a_p, a_g, b_p, b_g, norm_out_weight, norm_out_bias, out, g)
    z, mask = _plain(z, mask)
    du = add(None, as_rows(dy), keep, dy.shape, x.dtype).view(dy.shape)
    more = dy.contiguous() if into_z else None
    return launch.backward(du, x, stats, z, weights, mask, outgoing, eps, more)


_backward_op = torch.library.custom_op("megafold_bench::triangle_multiplication_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    z: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    a_p: Tensor,
    a_g: Tensor,
    b_p: Tensor | None,
    b_g: Tensor | None,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    out: Tensor,
    g: Tensor,
    mask: Tensor | None,
    keep: Tensor | None,
    outgoing: bool,
    eps: float,
    into_z: bool,
) -> tuple[Tensor, Tensor]:
    weights = (norm_in_weight, norm_in_bias, a_p, a_g, b_p, b_g, norm_out_weight, norm_out_bias, out, g)
    parameters = [t for t in weights if t is not None]
    size = sum(p.numel() for p in parameters)
    return z.new_empty(z.shape), z.new_empty(size, dtype=gradient_dtype(parameters))


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, residual, keep = inputs[0], inputs[12], inputs[13]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:12], keep)
    ctx.settings = inputs[14:16]
    ctx.residual = None if residual is None else residual.dtype
    ctx.into_z = residual is z


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 17
    saved = ctx.saved_tensors
    backward = same_way(ctx, _backward, torch.ops.megafold_bench.triangle_multiplication_backward)
    dz, flat = backward(dy, *saved, *ctx.settings, ctx.into_z)
    d_residual = None if ctx.residual is None or ctx.into_z else dy.to(ctx.residual)
    return (dz, *_in_order(flat, saved[3:13]), None, d_residual, None, None, None, None)


_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
