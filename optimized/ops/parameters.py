"""Parameters and their gradients, each in one launch: weights packed in the compute dtype, partial sums folded.

`pack_kernel` copies up to six matrices one after another into one buffer. `fold_kernel` adds the rows of up to
four matrices of partial sums, in a fixed order, into consecutive parts of one vector.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles the kernels: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.names import profiled_as
from optimized.ops.tuning import Config

PACK = Config({"BLOCK": 2048}, 4)
FOLD = Config({"ROWS": 128, "BLOCK": 32, "WIDE_ROWS": 8, "WIDE_BLOCK": 512}, 4)
_MOST = 6


@triton.jit(repr=profiled_as("parameters_pack"))
def pack_kernel(
    w0_ptr, w1_ptr, w2_ptr, w3_ptr, w4_ptr, w5_ptr, out_ptr, n0, n1, n2, n3, n4, n5, BLOCK: tl.constexpr
):
    """Block `program_id(0)` of matrix `program_id(1)`, to its place in the buffer."""
    which = tl.program_id(1)
    source = w0_ptr
    size = n0
    before = 0
    if which == 1:
        source = w1_ptr
        size = n1
        before = n0
    elif which == 2:
        source = w2_ptr
        size = n2
        before = n0 + n1
    elif which == 3:
        source = w3_ptr
        size = n3
        before = n0 + n1 + n2
    elif which == 4:
        source = w4_ptr
        size = n4
        before = n0 + n1 + n2 + n3
    elif which == 5:
        source = w5_ptr
        size = n5
        before = n0 + n1 + n2 + n3 + n4
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + k, mask=k < size, other=0.0)
    tl.store(out_ptr + before + k, value.to(out_ptr.dtype.element_ty), mask=k < size)


@triton.jit
def column_sums(source, out_ptr, rows, size, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of BLOCK columns of a matrix `[rows, size]`, from column `first` on."""
    column = first + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        where = source + row.to(tl.int64)[:, None] * size + column[None, :]
        total += tl.load(where, mask=(row < rows)[:, None] & (column < size)[None, :], other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < size)


@triton.jit(repr=profiled_as("parameters_fold"))
def fold_kernel(
    tall_partial0,
    tall_partial1,
    wide_partial0,
    wide_partial1,
    out_ptr,
    n0,
    n1,
    n2,
    n3,
    r0,
    r1,
    r2,
    r3,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    WIDE_BLOCK: tl.constexpr,
):
    """One block of columns of two tall matrices and two wide ones."""
    block = tl.program_id(0)
    narrow = tl.cdiv(n0, BLOCK) + tl.cdiv(n1, BLOCK)
    if block < narrow:
        source = tall_partial0
        size = n0
        rows = r0
        place = out_ptr
        if block >= tl.cdiv(n0, BLOCK):
            block = block - tl.cdiv(n0, BLOCK)
            source = tall_partial1
            size = n1
            rows = r1
            place = out_ptr + n0
        column_sums(source, place, rows, size, block * BLOCK, ROWS, BLOCK)
    else:
        block = block - narrow
        source = wide_partial0
        size = n2
        rows = r2
        place = out_ptr + n0 + n1
        if block >= tl.cdiv(n2, WIDE_BLOCK):
            block = block - tl.cdiv(n2, WIDE_BLOCK)
            source = wide_partial1
            size = n3
            rows = r3
            place = out_ptr + n0 + n1 + n2
        column_sums(source, place, rows, size, block * WIDE_BLOCK, WIDE_ROWS, WIDE_BLOCK)


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All weights one after another in one vector of `dtype`, in one launch where they agree in dtype."""
    sizes = [w.numel() for w in weights]
    whole = torch.empty(sum(sizes), dtype=dtype, device=weights[0].device)
    kinds = {w.dtype for w in weights}
    if len(weights) > _MOST or len(kinds) > 1 or not all(w.is_contiguous() for w in weights):
        torch._foreach_copy_(list(whole.split(sizes)), [w.reshape(-1) for w in weights])
        return whole
    spare = _MOST - len(weights)
    grid = (-(-max(sizes) // PACK.constants["BLOCK"]), len(weights), 1)
    pointers = [*weights, *([weights[0]] * spare), whole]
    launch(pack_kernel, grid, PACK, (*pointers, *sizes, *([0] * spare)))
    return whole


def gradient_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which gradients are folded: the parameters' where they share one, else fp32."""
    kinds = {p.dtype for p in parameters}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def fold(tall: Sequence[Tensor], wide: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Column sums of fp32 matrices `[rows, n]`, one after another in one vector of `dtype`, in one launch.

    Up to two `tall` ones (many rows, few columns: the norms' gradients), then one or two `wide` ones.
    """
    matrices = [tall[0], tall[-1], wide[0], wide[-1]]
    columns = [m.shape[1] for m in matrices]
    rows = [m.shape[0] for m in matrices]
    if len(tall) == 1:
        columns[1] = 0
    if len(wide) == 1:
        columns[3] = 0
    out = torch.empty(sum(columns), dtype=dtype, device=tall[0].device)
    blocks = (FOLD.constants["BLOCK"],) * 2 + (FOLD.constants["WIDE_BLOCK"],) * 2
    grid = (sum(-(-n // block) for n, block in zip(columns, blocks, strict=True)), 1, 1)
    launch(fold_kernel, grid, FOLD, (*matrices, out, *columns, *rows))
    return out


def unpacked(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector of gradients, in the shapes and dtypes of `parameters`."""
    parts = torch._C._nn.unflatten_dense_tensors(
        flat, list(parameters)
    )  # a third of the time of a split and views
    return [
        part if part.dtype == p.dtype else part.to(p.dtype) for part, p in zip(parts, parameters, strict=True)
    ]
