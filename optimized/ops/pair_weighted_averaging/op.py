"""Pair-weighted averaging as a differentiable operator."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.pair_weighted_averaging.reference import weighted_average_reference
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support

WIDTHS = (8, 16, 32, 64)
MAX_HEADS = 64


def supported(v: Tensor, logits: Tensor, mask: Tensor | None = None) -> Supported:
    """Whether the kernels take these tensors, and if not, why."""
    verdict = triton_support(v, logits)
    if not verdict.ok:
        return verdict
    if v.shape[3] not in WIDTHS:
        return Supported(
            False, f"{v.shape[3]} channels per head; the kernels take {', '.join(map(str, WIDTHS))}"
        )
    if v.shape[2] > MAX_HEADS:
        return Supported(False, f"{v.shape[2]} heads; the kernels take at most {MAX_HEADS}")
    if mask is not None and mask.device != v.device:
        return Supported(False, f"the mask is on {mask.device}, v on {v.device}")
    return Supported(False, "the input is empty") if 0 in (*v.shape, *logits.shape) else Supported(True)


def weighted_average(v: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ_j softmax_j(logits_hij) v_sjh `[S, I, H, d]`: the average of AF3 Algorithm 10, before its gate.

    v `[S, J, H, d]`, used and differentiated as it lies when contiguous; logits `[H, I, J]` of any strides and dtype;
    mask `[J]` boolean, True = keep. The weights are shared by all rows s and are the only intermediate that is kept.
    A token i without any key gets zero. Where the kernels do not apply (`supported` says why) the definition runs.
    Raises ValueError on shapes that do not fit.
    """
    if v.dim() != 4 or logits.dim() != 3 or (logits.shape[0], logits.shape[2]) != (v.shape[2], v.shape[1]):
        raise ValueError(f"want v [S,J,H,d] and logits [H,I,J]; got {tuple(v.shape)}, {tuple(logits.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (v.shape[1],)):
        raise ValueError(f"mask must be boolean [{v.shape[1]}], got {mask.dtype} {tuple(mask.shape)}")
    if not supported(v, logits, mask).ok:
        return weighted_average_reference(v, logits, mask)
    if direct(t for t in (v, logits, mask) if t is not None):
        return _Direct.apply(v, logits, mask)[0]
    return torch.ops.megafold_bench.weighted_average(v, logits, mask)[0]


def padded(columns: int) -> int:
    """Values in a row of the weights: a multiple of 16, or they could not be loaded 16 bytes at a time."""
    return columns + -columns % 16


@planned
def _forward(v: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from optimized.ops.pair_weighted_averaging import launch

    return launch.forward(v.contiguous(), logits, mask)


_forward_op = torch.library.custom_op("megafold_bench::weighted_average", mutates_args=())(_forward)


@_forward_op.register_fake
def _(v: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    heads, rows, columns = logits.shape
    return (
        v.new_empty((v.shape[0], rows, heads, v.shape[3])),
        v.new_empty((heads, rows, padded(columns))),
        v.new_empty((rows, heads), dtype=torch.float32),
    )


@planned
def _backward(
    do: Tensor, v: Tensor, logits: Tensor, mask: Tensor | None, w: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    from optimized.ops.pair_weighted_averaging import launch

    return launch.backward(do.contiguous(), v.contiguous(), logits, mask, w, lse)


_backward_op = torch.library.custom_op("megafold_bench::weighted_average_backward", mutates_args=())(
    _backward
)


@_backward_op.register_fake
def _(
    do: Tensor, v: Tensor, logits: Tensor, mask: Tensor | None, w: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    v, logits, mask = inputs
    ctx.save_for_backward(v, logits, mask, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, do: Tensor | None, _dw: Tensor | None, _dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if do is None:
        return None, None, None
    v, logits, mask, w, lse = ctx.saved_tensors
    return *same_way(ctx, _backward, torch.ops.megafold_bench.weighted_average_backward)(
        do, v, logits, mask, w, lse
    ), None


_forward_op.register_autograd(_differentiate, setup_context=_keep)
_Direct = undispatched(_forward, _keep, _differentiate)
