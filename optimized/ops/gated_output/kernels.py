"""The end of an update: sigmoid gate, output projection, shared dropout and residual.

out = residual + keep ⊙ (σ(g) ⊙ x)·Wᵀ on rows (i, j) of a pair tensor; keep has one value for all i or all j.
Backward: du = keep ⊙ dout, dxg = du·W, dx = σ ⊙ dxg, dg = σ(1-σ) ⊙ x ⊙ dxg, dW = duᵀ·(σ(g) ⊙ x);
the residual's gradient is dout itself.

Elements moved at width c = h: forward 4·rows·c (x, g, residual, out), 12 unfused; backward 6·rows·c with one kernel
for all gradients: a program owns BN columns of x and a share of the rows, and keeps its part of dW in registers.
Widths beyond 256 use a library product, with one elementwise kernel before it and one behind.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate, sigmoid


@triton.jit
def load_keep(keep_ptr, m, j, rows, columns, keep_row, keep_column, inside):
    """keep of rows m = (i, j) and channels j; zero strides along shared axes."""
    # In the width of the number of rows: a division of 64-bit numbers is a call of a subroutine.
    m = m.to(rows.dtype)
    where = (m // columns).to(tl.int64) * keep_row + (m % columns).to(tl.int64) * keep_column
    return tl.load(keep_ptr + where[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(repr=profiled_as("gated_output_forward"), do_not_specialize=["rows", "columns"])
def forward_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    residual_ptr,
    keep_ptr,
    out_ptr,
    rows,
    columns,
    keep_row,
    keep_column,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All C channels of BM rows; the gated input stays on the chip."""
    tl.assume(rows > 0)
    tl.assume(columns > 0)
    tl.assume(keep_row >= 0)
    tl.assume(keep_column >= 0)
    tl.assume(tl.program_id(0) >= 0)
    EXACT: tl.constexpr = w_ptr.dtype.element_ty == tl.float32
    dtype = w_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.arange(0, BH)
    wide = (m < rows)[:, None] & (k < H)[None, :]
    x = tl.load(x_ptr + m[:, None] * H + k[None, :], mask=wide, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + m[:, None] * H + k[None, :], mask=wide, other=0.0).to(tl.float32)
    gated = (sigmoid(g, False, EXACT) * x).to(dtype)
    for start in tl.range(0, C, BN, num_stages=STAGES):
        j = start + tl.arange(0, BN)
        w = tl.load(w_ptr + j[:, None] * H + k[None, :], mask=(j < C)[:, None] & (k < H)[None, :], other=0.0)
        out = tl.dot(gated, tl.trans(w), input_precision="ieee")
        inside = (m < rows)[:, None] & (j < C)[None, :]
        tile = m[:, None] * C + j[None, :]
        if KEEP:
            out *= load_keep(keep_ptr, m, j, rows, columns, keep_row, keep_column, inside)
        if RESIDUAL:
            out += tl.load(residual_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("gated_output_backward"), do_not_specialize=["rows", "columns", "splits"])
def backward_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    keep_ptr,
    dout_ptr,
    dx_ptr,
    dg_ptr,
    partial_ptr,
    rows,
    columns,
    splits,
    keep_row,
    keep_column,
    KEEP: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx and dg of BN columns on every `splits`-th tile of rows, and that share of dW `[C, H]`."""
    tl.assume(rows > 0)
    tl.assume(columns > 0)
    tl.assume(keep_row >= 0)
    tl.assume(keep_column >= 0)
    tl.assume(splits > 0)
    tl.assume(tl.program_id(1) >= 0)
    EXACT: tl.constexpr = w_ptr.dtype.element_ty == tl.float32
    dtype = w_ptr.dtype.element_ty
    split = tl.program_id(1)
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    real = (c < C)[:, None] & (k < H)[None, :]
    w = tl.load(w_ptr + c[:, None] * H + k[None, :], mask=real, other=0.0)
    dw = tl.zeros([BC, BN], tl.float32)
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        outer = (m < rows)[:, None] & (c < C)[None, :]
        du = tl.load(dout_ptr + m[:, None] * C + c[None, :], mask=outer, other=0.0)
        if KEEP:
            du = du.to(tl.float32) * load_keep(keep_ptr, m, c, rows, columns, keep_row, keep_column, outer)
        du = du.to(dtype)
        inside = (m < rows)[:, None] & (k < H)[None, :]
        tile = m[:, None] * H + k[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid(tl.load(g_ptr + tile, mask=inside, other=0.0).to(tl.float32), False, EXACT)
        gated = s * x
        dw = accumulate(dw, tl.trans(du), gated.to(dtype))
        dgated = tl.dot(du, w, input_precision="ieee")
        tl.store(dx_ptr + tile, (dgated * s).to(dx_ptr.dtype.element_ty), mask=inside)
        dg = dgated * gated * (1.0 - s)
        tl.store(dg_ptr + tile, dg.to(dg_ptr.dtype.element_ty), mask=inside)
    share = partial_ptr + split.to(tl.int64) * C * H
    tl.store(share + c[:, None] * H + k[None, :], dw, mask=real)


@triton.jit(repr=profiled_as("gated_output_gate"), do_not_specialize=["rows"])
def gate_kernel(x_ptr, g_ptr, out_ptr, rows, H: tl.constexpr, BLOCK: tl.constexpr):
    """σ(g) ⊙ x of rows of H values, elementwise."""
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    # As a product, so that the compiler knows what divides it: only then do masked accesses take 16 bytes at once.
    total = rows.to(tl.int64) * H
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < total, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + k, mask=k < total, other=0.0).to(tl.float32)
    tl.store(out_ptr + k, (sigmoid(g, False, EXACT) * x).to(out_ptr.dtype.element_ty), mask=k < total)


@triton.jit(repr=profiled_as("gated_output_gate_backward"), do_not_specialize=["rows"])
def gate_backward_kernel(
    x_ptr, g_ptr, dgated_ptr, dx_ptr, dg_ptr, gated_ptr, rows, H: tl.constexpr, BLOCK: tl.constexpr
):
    """dx and dg from the gradient of σ(g) ⊙ x, and that product again for the weight gradient; rows of H values."""
    EXACT: tl.constexpr = dgated_ptr.dtype.element_ty == tl.float32
    total = rows.to(tl.int64) * H
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + k, mask=k < total, other=0.0).to(tl.float32)
    s = sigmoid(tl.load(g_ptr + k, mask=k < total, other=0.0).to(tl.float32), False, EXACT)
    dgated = tl.load(dgated_ptr + k, mask=k < total, other=0.0).to(tl.float32)
    gated = s * x
    tl.store(gated_ptr + k, gated.to(gated_ptr.dtype.element_ty), mask=k < total)
    tl.store(dx_ptr + k, (dgated * s).to(dx_ptr.dtype.element_ty), mask=k < total)
    tl.store(dg_ptr + k, (dgated * gated * (1.0 - s)).to(dg_ptr.dtype.element_ty), mask=k < total)


@triton.jit(repr=profiled_as("gated_output_residual"), do_not_specialize=["rows", "columns"])
def residual_kernel(
    residual_ptr,
    update_ptr,
    keep_ptr,
    out_ptr,
    rows,
    columns,
    keep_row,
    keep_column,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """residual + keep ⊙ update on a tile of BM rows by BN channels; its own backward without the residual."""
    tl.assume(rows > 0)
    tl.assume(columns > 0)
    tl.assume(keep_row >= 0)
    tl.assume(keep_column >= 0)
    tl.assume(tl.program_id(0) >= 0)
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (j < C)[None, :]
    tile = m[:, None] * C + j[None, :]
    out = tl.load(update_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        out *= load_keep(keep_ptr, m, j, rows, columns, keep_row, keep_column, inside)
    if RESIDUAL:
        out += tl.load(residual_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=inside)
