"""Public attention with a shared pair bias: checks, torch.library operators, autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optimized.ops.attention import reference
from optimized.ops.launcher import direct
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

HEAD_DIMS = (8, 16, 24, 32, 48, 64)
PRECISIONS = ("ieee", "tf32x3", "tf32")
"""How fp32 products are taken: in fp32, as three TF32 products each (errors some 2⁻²¹), or as one. AMD has fp32 only."""


def supported(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None = None) -> Supported:
    """Whether the Triton kernels take this call; if not, the definition runs and the reason says why."""
    if q.shape[-1] not in HEAD_DIMS:
        return Supported(False, f"head size {q.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return Supported(False, f"q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if 0 in q.shape or 0 in k.shape:
        return Supported(False, "a dimension is empty")
    if mask is not None and mask.device != q.device:
        return Supported(False, f"the mask is on {mask.device}, q on {q.device}")
    return triton_support(q, k, v, bias)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, precision: str) -> None:
    if q.dim() < 4 or k.dim() != q.dim() or v.shape != k.shape or bias.dim() != q.dim():
        raise ValueError(
            f"want q [*,R,H,Q,D], k and v [*,R,H,K,D], bias [*,1,H,Q,K]; got {_shapes(q, k, v, bias)}"
        )
    rows, heads = q.shape[-4], q.shape[-3]
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q and k disagree outside the length: {_shapes(q, k)}")
    if bias.shape != (*q.shape[:-4], 1, heads, q.shape[-2], k.shape[-2]):
        raise ValueError(f"bias must be [*, 1, H, Q, K] for these q and k; got {_shapes(q, k, bias)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (*q.shape[:-4], rows, k.shape[-2])):
        raise ValueError(f"mask must be boolean [*, R, K], got {mask.dtype} {tuple(mask.shape)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def _available(precision: str) -> str:
    """How the kernels take fp32 products on this kind of GPU if asked for `precision`."""
    return precision if torch.version.hip is None else "ieee"


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _five(x: Tensor) -> Tensor:
    """Leading axes folded into one: [B, R, H, L, D]."""
    return x.reshape(-1, *x.shape[-4:])


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what o is kept for the backward pass where it is nobody's result: of bf16, in fp16.

    The sum over d of o · do is taken off all gradients of a row to its logits. o rounded to 8 bits, what the values of
    a row have in common makes that sum, and with it all of them, wrong by more than the gradients' own rounding; the
    definition's sum to zero whatever is rounded. 11 bits are enough, and o is an average of values: fp16 holds it.
    """
    return torch.float16 if dtype == torch.bfloat16 else dtype


@planned
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, precision: str,
    result: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, log-sum-exp and what its rounding does to the probabilities (empty but in fp32), unchecked, no autograd.

    `result`: the dtype of o, if not that of q.
    """
    from optimized.ops.attention import launch

    o = torch.empty_like(q, dtype=result)
    full = q.dtype == torch.float32
    lse = torch.empty((1 + full, *q.shape[:-1]), dtype=torch.float32, device=q.device)
    mask5 = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
    call = launch.make_call(_five(q), _five(k), _five(v), _five(bias), mask5, scale, precision, False)
    launch.launch_forward(call, _five(o), lse, launch.plan_for(q, precision).forward)
    # Results of a registered operator may not share memory.
    return o, lse[0], lse[1].clone() if full else _rounding_like(q)


def _rounding_like(q: Tensor) -> Tensor:
    return torch.empty(
        q.shape[:-1] if q.dtype == torch.float32 else (0,), dtype=torch.float32, device=q.device
    )


@planned
def run_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None,
    o: Tensor, lse: Tensor, rounding: Tensor | None, scale: float, precision: str, with_dbias: bool = True,
    spent: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and dbias (empty if not asked for) by the kernels, unchecked.

    `spent`: k and v are not needed any more, and dk and dv take their place in memory. A program has read the keys
    whose gradients it writes, and nobody else reads them.
    """
    from optimized.ops.attention import launch

    if rounding is not None and rounding.numel():
        # The kernels' probabilities are too small by this factor, row by row, and every gradient is linear in these two.
        do = do * rounding.unsqueeze(-1)
        dlse = None if dlse is None else dlse * rounding

    plan = launch.plan_for(q, precision)
    mask5 = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
    call = launch.make_call(_five(q), _five(k), _five(v), _five(bias), mask5, scale, precision, True)
    do5, o5 = launch.aligned(_five(do)), launch.aligned(_five(o))
    lse2, delta = launch.launch_statistics(
        call, o5, do5, lse.contiguous(), None if dlse is None else dlse.contiguous()
    )
    dbias = _bias_gradient(bias, with_dbias)
    planes = with_dbias and plan.grad_bias is None
    if with_dbias and plan.grad_bias is not None:
        launch.launch_grad_bias(call, do5, lse2, delta, _five(dbias), plan.grad_bias)
    dq = torch.empty_like(q)
    dbias5 = _five(dbias) if planes else None
    launch.launch_grad_q(call, do5, lse2, delta, _five(dq), plan.grad_q, dbias5, spent)
    call = launch.turned(call)
    # Only now: until here their place in memory was taken by planes of dbias.
    dk, dv = (k, v) if spent else (torch.empty_like(k), torch.empty_like(v))
    launch.launch_grad_kv(call, do5, lse2, delta, _five(dk), _five(dv), plan.grad_kv)
    return dq, dk, dv, dbias


def _bias_gradient(bias: Tensor, wanted: bool) -> Tensor:
    """Room for dbias, contiguous; empty where it is not wanted."""
    return torch.empty(bias.shape if wanted else (0,), dtype=bias.dtype, device=bias.device)


@torch.library.custom_op("megafold_bench::pair_attention", mutates_args=())
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    if supported(q, k, v, bias, mask).ok:
        return run_forward(q, k, v, bias, mask, scale, precision)
    o, lse = reference.attention_with_lse(q, k, v, bias, mask, scale)
    return torch.empty_like(q).copy_(o), lse.contiguous(), _rounding_like(q).fill_(1.0)


@_forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
    return torch.empty_like(q), lse, _rounding_like(q)


@torch.library.custom_op("megafold_bench::pair_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None,
    o: Tensor, lse: Tensor, rounding: Tensor | None, scale: float, precision: str, with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if supported(q, k, v, bias, mask).ok:
        return run_backward(do, dlse, q, k, v, bias, mask, o, lse, rounding, scale, precision, with_dbias)
    grads = reference.attention_backward(do, q, k, v, bias, mask, o, lse, scale, dlse)
    dq, dk, dv = (torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), grads[:3], strict=True))
    dbias = _bias_gradient(bias, with_dbias)
    return dq, dk, dv, dbias.copy_(grads[3]) if with_dbias else dbias


@_backward_op.register_fake
def _backward_fake(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None,
    o: Tensor, lse: Tensor, rounding: Tensor | None, scale: float, precision: str, with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _bias_gradient(bias, with_dbias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, bias, mask, scale, precision = inputs
    ctx.save_for_backward(q, k, v, bias, mask, *output)
    ctx.scale, ctx.precision = scale, precision
    ctx.set_materialize_grads(False)


def _differentiate(
    backward: Callable[..., tuple[Tensor, ...]], ctx: Any, do: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs by one of the two backward passes."""
    q, k, v, bias, mask, o, lse, rounding = ctx.saved_tensors
    if do is None and dlse is None:
        return (None,) * 7
    do = torch.zeros_like(o) if do is None else do
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = backward(
        do, dlse, q, k, v, bias, mask, o, lse, rounding, ctx.scale, ctx.precision, wanted
    )
    return dq, dk, dv, dbias if wanted else None, None, None, None


def _autograd(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    return _differentiate(_backward_op, ctx, do, dlse)


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same passes without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = run_forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        return _differentiate(run_backward, ctx, do, dlse)


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Attention of R rows with one bias for all, and its log-sum-exp (differentiable too).

    q [*, R, H, Q, D]; k, v [*, R, H, K, D]; bias [*, 1, H, Q, K] of any float dtype, in either orientation (a
    transposed view is read in place); mask [*, R, K] boolean, True = keep. Any strides with a contiguous last axis
    are read in place. `scale` defaults to D ** -0.5; `precision` is one of `PRECISIONS`. Returns o in the
    shape, dtype and memory order of q, and lse [*, R, H, Q] in fp32: natural logarithm, -inf for rows without keys,
    whose output and gradients are zero. Where `supported` says no, the definition runs. Raises ValueError on shapes
    or dtypes that do not fit.
    """
    _check(q, k, v, bias, mask, precision)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q, k, v, bias, mask, factor, _available(precision))
    tensors = (q, k, v, bias) if mask is None else (q, k, v, bias, mask)
    if direct(tensors) and supported(q, k, v, bias, mask).ok:
        return _Direct.apply(*inputs)[:2]
    return _forward_op(*inputs)[:2]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The output of `attention_with_lse`."""
    return attention_with_lse(q, k, v, bias, mask, scale, precision)[0]


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float | None = None,
    precision: str = "ieee",
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, dbias) without autograd, for callers that merge pieces of attention themselves.

    With the output and log-sum-exp of the *whole* softmax and the keys of one piece, the result is that piece's
    contribution. `dlse` [*, R, H, Q] is the gradient of the log-sum-exp, if it was used. dbias has bias's dtype.
    """
    _check(q, k, v, bias, mask, precision)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = (do, dlse, q, k, v, bias, mask, o, lse, None, factor, _available(precision), True)
    tensors = [t for t in inputs[:-3] if t is not None]
    if direct(tensors) and supported(q, k, v, bias, mask).ok:
        return run_backward(*inputs)
    return _backward_op(*inputs)
