"""The end of an update as differentiable operators: gate, output projection, shared dropout, residual."""

from typing import Any

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm.op import as_rows
from optimized.ops.gated_output.reference import add_update_reference, gated_output_reference
from optimized.ops.launcher import direct, same_way, undispatched
from optimized.ops.launching import compute_dtype
from optimized.ops.plans import planned
from optimized.ops.support import Supported, triton_support


def fits(shape: torch.Size, residual: Tensor | None, keep: Tensor | None) -> Supported:
    """Whether residual and dropout factors go with an update of this shape."""
    if residual is not None and residual.shape != shape:
        return Supported(False, f"a residual {list(residual.shape)} for an update {list(shape)}")
    if keep is None:
        return Supported(True)
    pairs = zip(keep.shape[::-1], shape[::-1], strict=False)
    if keep.dim() > len(shape) or any(k not in (1, n) for k, n in pairs):
        return Supported(False, f"dropout factors {list(keep.shape)} for an update {list(shape)}")
    return Supported(True)


def supported(
    x: Tensor, gate: Tensor, weight: Tensor, residual: Tensor | None = None, keep: Tensor | None = None
) -> Supported:
    """Whether the kernels of `gated_output` take these tensors, and if not, why."""
    verdict = triton_support(x, gate, weight, *(t for t in (residual, keep) if t is not None))
    if not verdict.ok:
        return verdict
    if x.numel() == 0:
        return Supported(False, "the input is empty")
    if gate.shape != x.shape:
        return Supported(False, f"a gate {list(gate.shape)} for an input {list(x.shape)}")
    return fits(torch.Size((*x.shape[:-1], weight.shape[0])), residual, keep)


def update_supported(residual: Tensor, update: Tensor, keep: Tensor | None = None) -> Supported:
    """Whether the kernel of `add_update` takes these tensors, and if not, why."""
    verdict = triton_support(residual, update, *([] if keep is None else [keep]))
    if not verdict.ok:
        return verdict
    if update.numel() == 0:
        return Supported(False, "the input is empty")
    return fits(update.shape, residual, keep)


def gated_output(
    x: Tensor, gate: Tensor, weight: Tensor, residual: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """residual + keep ⊙ weight · (sigmoid(gate) ⊙ x): the end of AF3 Algorithms 10, 14, 15 and 24 and their residual.

    x and gate `[..., h]`; weight `[c, h]`; residual `[..., c]`; keep `[..., I or 1, J or 1, c]` holds the factors of
    row- or column-shared dropout (1 / (1 - p) or 0) and gets no gradient. The product runs in autocast's dtype where
    autocast is on and in x's dtype otherwise; the result has that dtype, or the wider one of it and the residual's.
    Kept for the backward pass: x, gate, weight and keep. Where the kernels do not apply (`supported` says why) the
    definition runs.
    """
    dtype = compute_dtype(x)
    if not supported(x, gate, weight, residual, keep).ok:
        return gated_output_reference(x.to(dtype), gate, weight, residual, keep)
    if direct(t for t in (x, gate, weight, residual, keep) if t is not None):
        return _DirectGated.apply(x, gate, weight, residual, keep, dtype)
    return torch.ops.megafold_bench.gated_output(x, gate, weight, residual, keep, dtype)


def add_update(residual: Tensor, update: Tensor, keep: Tensor | None = None) -> Tensor:
    """residual + keep ⊙ update in one pass; shapes as for `gated_output`, result in the wider dtype of the two.

    Only keep, which gets no gradient, is kept for the backward pass. Where the kernel does not apply
    (`update_supported` says why) the definition runs.
    """
    if not update_supported(residual, update, keep).ok:
        return add_update_reference(residual, update, keep)
    if direct(t for t in (residual, update, keep) if t is not None):
        return _DirectAdd.apply(residual, update, keep)
    return torch.ops.megafold_bench.add_update(residual, update, keep)


@planned
def run_forward(
    x: Tensor, gate: Tensor, weight: Tensor, residual: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The result by the kernels, unchecked and without autograd."""
    from optimized.ops.gated_output import launch

    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    rows = None if residual is None else as_rows(residual)
    return launch.forward(as_rows(x), as_rows(gate), weight, rows, keep, shape, dtype).view(shape)


_gated_op = torch.library.custom_op("megafold_bench::gated_output", mutates_args=())(run_forward)


@_gated_op.register_fake
def _(
    x: Tensor, gate: Tensor, weight: Tensor, residual: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = dtype if residual is None else torch.promote_types(residual.dtype, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out)


@planned
def _gated_backward(
    dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from optimized.ops.gated_output import launch

    dx, dg, dw = launch.backward(as_rows(dout), as_rows(x), as_rows(gate), weight, keep, dout.shape, dtype)
    return dx.view(x.shape), dg.view(gate.shape), dw


_gated_backward_op = torch.library.custom_op("megafold_bench::gated_output_backward", mutates_args=())(
    _gated_backward
)


@_gated_backward_op.register_fake
def _(
    dout: Tensor, x: Tensor, gate: Tensor, weight: Tensor, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        gate.new_empty(gate.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
    )


def _keep_gated(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, gate, weight, residual, keep, ctx.dtype = inputs
    ctx.save_for_backward(x, gate, weight, keep)
    ctx.residual = None if residual is None else residual.dtype


def _differentiate_gated(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight, keep = ctx.saved_tensors
    dx, dg, dw = same_way(ctx, _gated_backward, torch.ops.megafold_bench.gated_output_backward)(
        dout, x, gate, weight, keep, ctx.dtype
    )
    d_residual = None if ctx.residual is None else dout.to(ctx.residual)
    return dx, dg, dw.to(weight.dtype), d_residual, None, None


_gated_op.register_autograd(_differentiate_gated, setup_context=_keep_gated)
_DirectGated = undispatched(run_forward, _keep_gated, _differentiate_gated)


@planned
def _add(residual: Tensor, update: Tensor, keep: Tensor | None) -> Tensor:
    from optimized.ops.gated_output import launch

    dtype = torch.promote_types(residual.dtype, update.dtype)
    return launch.add(as_rows(residual), as_rows(update), keep, update.shape, dtype).view(update.shape)


_add_op = torch.library.custom_op("megafold_bench::add_update", mutates_args=())(_add)


@_add_op.register_fake
def _(residual: Tensor, update: Tensor, keep: Tensor | None) -> Tensor:
    return update.new_empty(update.shape, dtype=torch.promote_types(residual.dtype, update.dtype))


@planned
def _masked(update: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """keep ⊙ update in `dtype`: the backward of `add_update`."""
    from optimized.ops.gated_output import launch

    return launch.add(None, as_rows(update), keep, update.shape, dtype).view(update.shape)


_masked_op = torch.library.custom_op("megafold_bench::masked_update", mutates_args=())(_masked)


@_masked_op.register_fake
def _(update: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    return update.new_empty(update.shape, dtype=dtype)


def _keep_add(ctx: Any, inputs: tuple, output: Tensor) -> None:
    residual, update, keep = inputs
    ctx.save_for_backward(*([] if keep is None else [keep]))
    ctx.dtypes = residual.dtype, update.dtype


def _differentiate_add(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    residual, update = ctx.dtypes
    kept = ctx.saved_tensors  # once: checkpointing recomputes what is unpacked, and refuses a second time
    if not kept:
        return dout.to(residual), dout.to(update), None
    du = same_way(ctx, _masked, torch.ops.megafold_bench.masked_update)(dout, kept[0], update)
    return dout.to(residual), du, None


_add_op.register_autograd(_differentiate_add, setup_context=_keep_add)
_DirectAdd = undispatched(_add, _keep_add, _differentiate_add)
