"""A matrix product of float32 as three TF32 products on tensor cores.

Every operand is split into a TF32 number and what is left: x = h + l, h rounded to 11 bits, l exact in float32. Then
x·w = h·h + h·l + l·h up to l·l, some 2⁻²⁴ of the product: about what float32 rounds away. The splitting happens
between memory and tensor cores, so nothing but x and w is read. Products of BK terms are summed apart before they
are added to the total, since tensor cores truncate where float32 units round.

FLOP: 3·2·M·N·K of TF32, against 2·M·N·K of float32 at some 1/7 of the rate on an H200.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as


@triton.jit
def high(x):
    """x rounded to TF32's 11 bits, halves away from zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit(repr=profiled_as("linear"), do_not_specialize=["rows"])
def product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    columns,
    terms,
    x_row,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of y `[rows, columns]` = Σ_k x[m, k]·w[n, k] + bias; terms side by side in memory, w contiguous.

    EVEN: BK divides `terms`. Rows and columns outside wrap around and are not stored.
    """
    across = tl.cdiv(columns, BN)
    m = (tl.program_id(0) // across) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x_ptr + (m % rows).to(tl.int64)[:, None] * x_row + k[None, :]
    w_at = w_ptr + (n % columns).to(tl.int64)[None, :] * terms + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, terms, BK, num_stages=STAGES):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = start + k < terms
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        x_high = high(x)
        w_high = high(w)
        part = tl.dot(x - x_high, w_high, input_precision="tf32")
        part = tl.dot(x_high, w - w_high, part, input_precision="tf32")
        # `max_num_imprecise_acc` keeps Triton from folding the sum below into the product.
        part = tl.dot(x_high, w_high, part, input_precision="tf32", max_num_imprecise_acc=1)
        total += part
        x_at += BK
        w_at += BK
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < columns, other=0.0)[None, :]
    where = y_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(where, total, mask=(m < rows)[:, None] & (n < columns)[None, :])
