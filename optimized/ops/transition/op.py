"""Transition as a differentiable operator: LayerNorm, SwiGLU and projection in one kernel; in float32 over runs of rows."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.parameters import gradient_dtype, unpacked
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support
from optimized.ops.transition import full, launch
from optimized.ops.transition.reference import transition_reference

MAX_CHANNELS = 512


def supported(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, w_a: Tensor, w_b: Tensor, w_out: Tensor
) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = triton_support(x, norm_weight, norm_bias, w_a, w_b, w_out)
    if not verdict.ok:
        return verdict
    if x.shape[-1] > MAX_CHANNELS and compute_dtype(x) != torch.float32:
        return Supported(
            False, f"{x.shape[-1]} channels; the kernels hold at most {MAX_CHANNELS} per row on the chip"
        )
    return Supported(False, "the input is empty") if x.numel() == 0 else Supported(True)


def transition(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float = 1e-5,
    added: bool = False,
) -> Tensor:
    """AF3 Algorithm 11: w_out · (swish(w_a · LN(x)) ⊙ w_b · LN(x)), or with `added` x plus that.

    x `[..., c]`; norm_weight, norm_bias `[c]`; w_a, w_b `[h, c]`; w_out `[c, h]`. The products run in autocast's
    dtype where autocast is on and in x's dtype otherwise; the result has that dtype, with `added` the wider one of it and
    x's. Parameters may have another dtype. Only x and the parameters are kept for the backward pass. Where the
    kernels do not apply (`supported` says why) the definition runs.
    """
    parameters = (norm_weight, norm_bias, w_a, w_b, w_out)
    dtype = compute_dtype(x)
    if not supported(x, *parameters).ok:
        return transition_reference(x, *parameters, eps, dtype, added)
    if direct((x, *parameters)):
        return _Direct.apply(x, *parameters, eps, dtype, added)
    return torch.ops.megafold_bench.transition(x, *parameters, eps, dtype, added)


@planned
def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if dtype == torch.float32:
        with torch.autocast(x.device.type, enabled=False):
            y = full.forward(rows, [norm_weight, norm_bias, w_a, w_b, w_out], eps)
            return (y.add_(rows) if added else y).view(x.shape)
    weights = (w_a, w_b, w_out)
    return launch.run_forward(rows, (norm_weight, norm_bias), weights, eps, dtype, added).view(x.shape)


_op = torch.library.custom_op("megafold_bench::transition", mutates_args=())(_forward)


@_op.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, dtype) if added else dtype)


@planned
def _backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    dy = dy.reshape(rows.shape).contiguous()
    if dtype == torch.float32:
        with torch.autocast(x.device.type, enabled=False):
            dx, flat = full.backward(dy, rows, [norm_weight, norm_bias, w_a, w_b, w_out], eps)
            dx = dx.add_(dy) if added else dx
    else:
        weights = [w_a, w_b, w_out]
        dx, flat = launch.backward(dy, rows, (norm_weight, norm_bias), weights, eps, dtype, added)
    return dx.view(x.shape), flat


_backward_op = torch.library.custom_op("megafold_bench::transition_backward", mutates_args=())(_backward)


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_out: Tensor,
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> tuple[Tensor, Tensor]:
    kind = gradient_dtype((norm_weight, norm_bias, w_a, w_b, w_out))
    return x.new_empty(x.shape), x.new_empty(2 * x.shape[-1] + 3 * w_a.numel(), dtype=kind)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    backward = same_way(ctx, _backward, torch.ops.megafold_bench.transition_backward)
    dx, flat = backward(dy, *saved, *ctx.settings)
    return (dx, *unpacked(flat, saved[1:]), None, None, None)


_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
