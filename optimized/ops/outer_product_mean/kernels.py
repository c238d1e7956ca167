"""Projection of outer products in the layout a matrix product writes them, and its two gradients.

A library product gives O = aᵀb for a block of rows i as `[(i, c), (j, d)]`. For a fixed i the operand (j, k) of the
projection, k = (c, d), lies at (i·C + k div D)·J·D + j·D + k mod D: runs of D values, so the kernels read and write
that layout as it is and the 1024-wide intermediate is never permuted, and never larger than the caller's block.

    project: out_ij = s_ij (W·O_ij + bias)        2·N²·C·D·Z FLOP; reads O once
    expand:  dO_ij = Wᵀ·(s_ij dout_ij)            the same; writes dO once
    weight:  dW = Σ_ij (s_ij dout_ij) ⊗ O_ij      the same; reads O once, sums kept per program in fp32

The outer products themselves cost 2·S·N²·C·D, S/128 times as much, forward, and three times that backward.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate


@triton.jit
def outer_offset(i, j, k, columns, C: tl.constexpr, D: tl.constexpr):
    """Where (i, j, k) of a block `[(i, C), (columns, D)]` lies; i a number, j `[R, 1]` and k `[1, K]`."""
    row = (i * C + k // D).to(tl.int64) * columns
    return (row + j) * D + k % D


@triton.jit
def scaled_gradient(dout_ptr, scale_ptr, i, j, z, rows, inside, Z: tl.constexpr):
    """s_ij dout_ij of tokens j `[R]` and channels z in fp32."""
    place = i.to(tl.int64) * rows + j
    dout = tl.load(dout_ptr + place[:, None] * Z + z[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + place, mask=j < rows, other=0.0).to(tl.float32)
    return dout * scale[:, None]


@triton.jit(repr=profiled_as("outer_product_mean_project"), do_not_specialize=["first", "total"])
def project_kernel(
    o_ptr,
    w_ptr,
    bias_ptr,
    scale_ptr,
    out_ptr,
    first,
    total,
    C: tl.constexpr,
    D: tl.constexpr,
    Z: tl.constexpr,
    BZ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out of BM tokens j for row `first` + i, from a block of O that starts at row `first`; all `total` tokens j."""
    i = tl.program_id(0)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    z = tl.arange(0, BZ)
    acc = tl.zeros([BM, BZ], tl.float32)
    for start in tl.range(0, C * D, BN, num_stages=STAGES):
        k = start + tl.arange(0, BN)
        where = outer_offset(i, j[:, None], k[None, :], total, C, D)
        o = tl.load(o_ptr + where, mask=(j < total)[:, None] & (k < C * D)[None, :], other=0.0)
        real = (z < Z)[:, None] & (k < C * D)[None, :]
        w = tl.load(w_ptr + z[:, None] * (C * D) + k[None, :], mask=real, other=0.0)
        acc = accumulate(acc, o, tl.trans(w))
    bias = tl.load(bias_ptr + z, mask=z < Z, other=0.0).to(tl.float32)
    place = (first + i).to(tl.int64) * total + j
    scale = tl.load(scale_ptr + place, mask=j < total, other=0.0).to(tl.float32)
    out = (acc + bias[None, :]) * scale[:, None]
    inside = (j < total)[:, None] & (z < Z)[None, :]
    tl.store(out_ptr + place[:, None] * Z + z[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    repr=profiled_as("outer_product_mean_expand"),
    do_not_specialize=["first_row", "first_column", "columns", "total"],
)
def expand_kernel(
    dout_ptr,
    scale_ptr,
    w_ptr,
    do_ptr,
    first_row,
    first_column,
    columns,
    total,
    C: tl.constexpr,
    D: tl.constexpr,
    Z: tl.constexpr,
    BZ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dO of BM of the block's `columns` tokens j for one of its rows i; the block starts at (first_row, first_column)."""
    i = tl.program_id(0)
    own = tl.program_id(1) * BM + tl.arange(0, BM)
    z = tl.arange(0, BZ)
    valid = own < columns
    inside = valid[:, None] & (z < Z)[None, :]
    grad = scaled_gradient(dout_ptr, scale_ptr, first_row + i, first_column + own, z, total, inside, Z).to(
        w_ptr.dtype.element_ty
    )
    for start in tl.range(0, C * D, BN, num_stages=STAGES):
        k = start + tl.arange(0, BN)
        real = (z < Z)[:, None] & (k < C * D)[None, :]
        w = tl.load(w_ptr + z[:, None] * (C * D) + k[None, :], mask=real, other=0.0)
        do = tl.dot(grad, w, input_precision="ieee")
        where = outer_offset(i, own[:, None], k[None, :], columns, C, D)
        tl.store(do_ptr + where, do.to(do_ptr.dtype.element_ty), mask=valid[:, None] & (k < C * D)[None, :])


@triton.jit(
    repr=profiled_as("outer_product_mean_weight"), do_not_specialize=["first", "count", "total", "splits"]
)
def weight_kernel(
    dout_ptr,
    scale_ptr,
    o_ptr,
    partial_ptr,
    bias_partial_ptr,
    first,
    count,
    total,
    splits,
    FRESH: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    Z: tl.constexpr,
    BZ: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN of the C·D columns of dW over every `splits`-th tile of (i, j) of a block of `count` rows i.

    Added to what earlier blocks left unless FRESH; one program per split does the same for the bias.
    """
    split = tl.program_id(1)
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    z = tl.arange(0, BZ)
    real = (z < Z)[:, None] & (k < C * D)[None, :]
    share = partial_ptr + split.to(tl.int64) * Z * C * D + z[:, None] * (C * D) + k[None, :]
    bias_share = bias_partial_ptr + split * Z + z
    acc = tl.zeros([BZ, BN], tl.float32)
    bias = tl.zeros([BZ], tl.float32)
    if not FRESH:
        acc = tl.load(share, mask=real, other=0.0)
        bias = tl.load(bias_share, mask=z < Z, other=0.0)
    tiles = tl.cdiv(total, BM)
    for tile in tl.range(split, count * tiles, splits, num_stages=STAGES):
        i = tile // tiles
        j = (tile % tiles) * BM + tl.arange(0, BM)
        inside = (j < total)[:, None] & (z < Z)[None, :]
        grad = scaled_gradient(dout_ptr, scale_ptr, first + i, j, z, total, inside, Z)
        where = outer_offset(i, j[:, None], k[None, :], total, C, D)
        o = tl.load(o_ptr + where, mask=(j < total)[:, None] & (k < C * D)[None, :], other=0.0)
        acc = accumulate(acc, tl.trans(grad.to(o.dtype)), o)
        bias += tl.sum(grad, 0)
    tl.store(share, acc, mask=real)
    if tl.program_id(0) == 0:
        tl.store(bias_share, bias, mask=z < Z)
