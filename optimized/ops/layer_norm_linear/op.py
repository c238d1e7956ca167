"""LayerNorm + Linear(s) as a differentiable operator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.ops.launcher import direct
from optimized.ops.launching import compute_dtype
from optimized.ops.layer_norm_linear import launch
from optimized.ops.layer_norm_linear.reference import layer_norm_linear_reference
from optimized.ops.parameters import gradient_dtype, pack, unpacked
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

MAX_CHANNELS = 512
MAX_WEIGHTS = 4


def supported(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None = None,
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    heads = [head_weight] if head_weight is not None else []
    verdict = triton_support(x, norm_weight, norm_bias, *weights, *heads)
    if not verdict.ok:
        return verdict
    if x.shape[-1] > MAX_CHANNELS:
        return Supported(
            False, f"{x.shape[-1]} channels; the kernels hold at most {MAX_CHANNELS} per row on the chip"
        )
    if len(weights) > MAX_WEIGHTS:
        return Supported(False, f"{len(weights)} weights; the kernels take at most {MAX_WEIGHTS}")
    if not weights and head_weight is None:
        return Supported(False, "there is no weight")
    if len({w.shape for w in weights}) > 1:
        return Supported(False, f"the weights have different shapes: {[list(w.shape) for w in weights]}")
    if head_weight is not None and head_weight.shape[0] > 64:
        return Supported(False, f"{head_weight.shape[0]} heads; the kernels take at most 64")
    return Supported(False, "the input is empty") if x.numel() == 0 else Supported(True)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None = None,
    eps: float = 1e-5,
    carried: bool = False,
) -> list[Tensor]:
    """[w · LN(x) for w in weights], and head_weight · LN(x) with its channels first, reading x once.

    x `[..., c]`; up to four weights `[h, c]` of one shape give `[..., h]`, each contiguous, so that
    `y.unflatten(-1, (heads, d))` is the `[row, token, head, d]` view the attention kernels take; head_weight
    `[heads, c]` gives `[heads, ...]`. Products and results are in autocast's dtype where autocast is on and in
    x's dtype otherwise. With `carried` x is the last result too, for what else needs it: of that, the gradient is then
    added where this one's is written, not in a pass of its own. Only x and the parameters are kept for the backward
    pass. Where the kernels do not apply (`supported` says why) the definition runs.
    """
    dtype = compute_dtype(x)
    parameters = (norm_weight, norm_bias, weights, head_weight)
    heads = [head_weight] if head_weight is not None else []
    if not supported(x, *parameters).ok:
        results = layer_norm_linear_reference(x, *parameters, eps, dtype)
    elif direct((x, norm_weight, norm_bias, *weights, *heads)):
        everything = (norm_weight, norm_bias, *weights, *heads)
        through = carried and x.requires_grad
        results = list(_LayerNormLinear.apply(x, len(weights), eps, dtype, through, *everything))
        if through:
            return results
    else:
        op = torch.ops.megafold_bench.layer_norm_linear
        results = op(x, norm_weight, norm_bias, list(weights), head_weight, eps, dtype)
    return [*results, x] if carried else results


class _LayerNormLinear(torch.autograd.Function):
    """The same passes without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, eps: float, dtype: torch.dtype, carried: bool, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parameters)
        ctx.settings = (count, eps, carried)
        ctx.set_materialize_grads(not carried)
        results = tuple(_forward(x, count, eps, dtype, *parameters))
        ctx.like = [(y.shape, y.dtype) for y in results]
        # Detached: returned as it is, x would be a view here that nothing may be written into.
        return (*results, x.detach()) if carried else results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, eps, carried = ctx.settings
        x, *parameters = ctx.saved_tensors
        *own, more = grads if carried else (*grads, None)
        if carried and all(g is None for g in own):
            return (more, *(None,) * (4 + len(parameters)))
        whole = [
            x.new_zeros(shape, dtype=dtype) if g is None else g
            for g, (shape, dtype) in zip(own, ctx.like, strict=True)
        ]
        dx, flat = _backward(x, more, count, eps, len(whole), *whole, *parameters)
        return (dx, None, None, None, None, *unpacked(flat, parameters))


def packed(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The matrices among `parameters` as both passes take them."""
    return pack(parameters[2:], dtype)


def run_forward(
    x: Tensor,
    parameters: Sequence[Tensor],
    count: int,
    eps: float,
    dtype: torch.dtype,
    w: Tensor | None = None,
) -> list[Tensor]:
    """The results by the kernels, unchecked; `parameters` are γ, β, `count` weights and perhaps the head weight.

    `w`: what `packed` makes of them, where there is one already.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    matrices = parameters[2:]
    head = matrices[count] if len(matrices) > count else None
    widths = launch.Widths.of(matrices[:count], head)
    w = packed(parameters, dtype) if w is None else w
    outs = launch.forward(rows, (parameters[0], parameters[1]), w, widths, eps)
    shaped = [y.view(*x.shape[:-1], -1) for y in outs[:count]]
    return shaped + [s.view(-1, *x.shape[:-1]) for s in outs[count:]]


def run_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    parameters: Sequence[Tensor],
    count: int,
    eps: float,
    w: Tensor | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx and the gradients of the parameters in one vector by the kernels, unchecked; `w` as for `run_forward`.

    `more`: another gradient of x, which is added to dx.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    flat = [g.reshape(rows.shape[0], -1).contiguous() for g in grads[:count]]
    flat += [g.reshape(-1, rows.shape[0]).contiguous() for g in grads[count:]]
    matrices = parameters[2:]
    head = matrices[count] if len(matrices) > count else None
    w = packed(parameters, flat[0].dtype) if w is None else w
    norm = (parameters[0], parameters[1])
    more = None if more is None else more.reshape(rows.shape).contiguous()
    dx, gradients = launch.backward(flat, rows, norm, matrices[:count], head, w, eps, more)
    return dx.view(x.shape), gradients


@planned
def _forward(x: Tensor, count: int, eps: float, dtype: torch.dtype, *parameters: Tensor) -> list[Tensor]:
    """`run_forward` of parameters in a row."""
    return run_forward(x, list(parameters), count, eps, dtype)


@planned
def _backward(
    x: Tensor, more: Tensor | None, count: int, eps: float, results: int, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """`run_backward` of the gradients of the results and the parameters in a row."""
    return run_backward(rest[:results], x, list(rest[results:]), count, eps, more=more)


@torch.library.custom_op("megafold_bench::layer_norm_linear", mutates_args=())
def _layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    heads = [head_weight] if head_weight is not None else []
    return _forward(x, len(weights), eps, dtype, norm_weight, norm_bias, *weights, *heads)


@_layer_norm_linear.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    outs = [x.new_empty((*x.shape[:-1], w.shape[0]), dtype=dtype) for w in weights]
    if head_weight is not None:
        outs.append(x.new_empty((head_weight.shape[0], *x.shape[:-1]), dtype=dtype))
    return outs


@torch.library.custom_op("megafold_bench::layer_norm_linear_backward", mutates_args=())
def _layer_norm_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    heads = [head_weight] if head_weight is not None else []
    return _backward(x, None, len(weights), eps, len(grads), *grads, norm_weight, norm_bias, *weights, *heads)


@_layer_norm_linear_backward.register_fake
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weights: Sequence[Tensor],
    head_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    heads = [head_weight] if head_weight is not None else []
    parameters = (norm_weight, norm_bias, *weights, *heads)
    size = sum(p.numel() for p in parameters)
    return x.new_empty(x.shape), x.new_empty(size, dtype=gradient_dtype(parameters))


def _keep(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, norm_weight, norm_bias, weights, head_weight, eps, _ = inputs
    ctx.save_for_backward(
        x, norm_weight, norm_bias, *weights, *([head_weight] if head_weight is not None else [])
    )
    ctx.settings = (len(weights), eps)


def _differentiate(ctx: Any, grads: list[Tensor]) -> tuple:
    count, eps = ctx.settings
    x, norm_weight, norm_bias, *rest = ctx.saved_tensors
    weights, heads = rest[:count], rest[count:]
    head_weight = heads[0] if heads else None
    op = torch.ops.megafold_bench.layer_norm_linear_backward
    dx, flat = op(grads, x, norm_weight, norm_bias, weights, head_weight, eps)
    d_weight, d_bias, *parts = unpacked(flat, (norm_weight, norm_bias, *rest))
    return dx, d_weight, d_bias, parts[:count], (parts[count] if heads else None), None, None


_layer_norm_linear.register_autograd(_differentiate, setup_context=_keep)
