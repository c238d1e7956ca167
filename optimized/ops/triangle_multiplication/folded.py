"""Forward kernel of triangle multiplication's input projections that multiplies the raw rows and normalises the products.

With γ and β folded into a weight row w, LN(z)·w = rstd · (z·w') - rstd·mean · Σw' + β·w, where w' = γ ⊙ w is rounded
to the compute dtype and Σw' sums what was rounded: the result is that of (z - mean)·w' whatever the mean, with one
rounding where the definition has two (LN(z) and w). So z goes from memory into the matrix unit as it lies, by
asynchronous copies several tiles ahead, and the registers never see it; rstd and mean are those of `statistics`.
Channels are the rows of the products, so that nothing is transposed on the way out.

It needs z in the compute dtype, 16 bits wide: `project` has the kernel for everything else.

The sigmoid's own factor is folded into the weights too: 1/2 for linear part and gate where it is the hardware's tanh,
-log2(e) for the gate where it is an exponential. `folded` holds the four matrices as `pack_weights` orders them, then
those of the output side for `folded_output`: its gate likewise, and the output projection less its rows' means, which
LN takes off anyway; `sums` holds Σw' and β·w of every row, in fp32.

One GEMM unit is 2·N²·c·h FLOP: 4 units. Bytes: those of the kernel it stands for.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import fast_tanh, row_statistics
from optimized.ops.triangle_multiplication.project import pair_rows


@triton.jit
def place_rows(start, n_tokens, padded, stride_i, stride_j, BM: tl.constexpr, EVEN: tl.constexpr):
    """Of the positions from `start` on: whether inside the N·N square, offset in z, index in the dense square.

    EVEN: N is a multiple of BM, so that a tile lies in one row of the square: one division for all of it, and a
    tile is inside as a whole.
    """
    k = tl.arange(0, BM)
    if EVEN:
        i = start // padded
        j = start % padded
        inside = (k >= 0) & (start < padded * padded)
        base = i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
        source = base + k.to(tl.int64) * stride_j
        dense = start.to(tl.int64) + k
    else:
        inside, source, dense = pair_rows(start + k, n_tokens, padded, stride_i, stride_j)
    return inside, source, dense


@triton.jit
def scale_and_shift(z, c, eps, C: tl.constexpr):
    """rstd and -mean·rstd of every row of a tile `[BM, BC]` whose padding columns are zero; two passes in fp32."""
    mean, rstd = row_statistics(z.to(tl.float32), c, eps, C)
    return rstd, -mean * rstd


@triton.jit
def gated(linear, gate, FAST: tl.constexpr):
    """linear · σ(gate) of products whose weights hold the factors of `fold_weights_kernel`."""
    if FAST:
        t = fast_tanh(gate)
        return linear * t + linear
    else:
        return linear / (1.0 + tl.exp2(gate))


@triton.jit(repr=profiled_as("triangle_multiplication_fold_weights"))
def fold_weights_kernel(
    a_p_ptr,
    b_p_ptr,
    a_g_ptr,
    b_g_ptr,
    out_ptr,
    g_ptr,
    gamma_ptr,
    beta_ptr,
    gamma_out_ptr,
    beta_out_ptr,
    plain_ptr,
    folded_ptr,
    sums_partial_ptr,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of matrix `program_id(1)` as they are, and folded, with their two sums."""
    which = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    source = a_p_ptr
    rows = H
    width = C
    cells = which * (H * C)
    LINEAR: tl.constexpr = 0.5 if FAST else 1.0
    GATE: tl.constexpr = 0.5 if FAST else -1.4426950408889634
    factor = tl.full([], LINEAR, tl.float32)
    if which == 1:
        source = b_p_ptr
    elif which == 2:
        source = a_g_ptr
        factor = tl.full([], GATE, tl.float32)
    elif which == 3:
        source = b_g_ptr
        factor = tl.full([], GATE, tl.float32)
    elif which == 4:
        source = out_ptr
        rows = C
        width = H
        factor = tl.full([], 1.0, tl.float32)
    elif which == 5:
        source = g_ptr
        rows = C
        factor = tl.full([], GATE, tl.float32)
    real = (r < rows)[:, None] & (k < width)[None, :]
    w = tl.load(source + r[:, None] * width + k[None, :], mask=real, other=0.0).to(tl.float32)
    place = cells + r[:, None] * width + k[None, :]
    tl.store(plain_ptr + place, w.to(plain_ptr.dtype.element_ty), mask=real)
    if which == 4:
        gamma = tl.load(gamma_out_ptr + k, mask=k < H, other=0.0).to(tl.float32)
        beta = tl.load(beta_out_ptr + k, mask=k < H, other=0.0).to(tl.float32)
    else:
        gamma = tl.load(gamma_ptr + k, mask=k < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + k, mask=k < C, other=0.0).to(tl.float32)
    w *= factor
    folded = w * gamma[None, :]
    if which == 4:
        folded = tl.where(real, folded - (tl.sum(folded, 1) / H)[:, None], 0.0)
    folded = folded.to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + place, folded, mask=real)
    # The input projections' sums of folded rows, then of β times rows; then both of the output projection, of the gate.
    sums = sums_partial_ptr + which * H + r
    other = 4 * H
    if which >= 4:
        sums = sums_partial_ptr + 8 * H + (which - 4) * (2 * C) + r
        other = C
    tl.store(sums, tl.sum(folded.to(tl.float32), 1), mask=r < rows)
    tl.store(sums + other, tl.sum(w * beta[None, :], 1), mask=r < rows)


@triton.jit
def moment_of(e):
    """Which row of the moments (1 / rstd high and low, -mean high and low) is multiplied by column e of `beside_weights`."""
    return tl.where(e == 1, 1, tl.where((e == 3) | (e == 5), 2, tl.where(e == 4, 3, 0)))


@triton.jit
def in_two_parts(x, e, dtype: tl.constexpr):
    """`[rows, 16]` in fp32: x in columns e = 0 and 1 as it is rounded, in column 2 what that leaves, else zero.

    Beside the high and low part of another number and the high one again: the product of the low ones is left out.
    """
    high = x.to(dtype).to(tl.float32)
    first = ((e == 0) | (e == 1))[None, :]
    return tl.where(first, high[:, None], tl.where((e == 2)[None, :], (x - high)[:, None], 0.0))


@triton.jit
def beside_weights(sums_ptr, rows, real, e, other, dtype: tl.constexpr):
    """`[rows, 16]`: what `moment_of` a position is multiplied by, from Σw' and, `other` further on, β·w in fp32."""
    sums = tl.load(sums_ptr + rows, mask=real, other=0.0)
    biases = tl.load(sums_ptr + other + rows, mask=real, other=0.0)
    return (in_two_parts(biases, e, dtype) + in_two_parts(sums, e - 3, dtype)).to(dtype)


@triton.jit(repr=profiled_as("triangle_multiplication_project_folded"), do_not_specialize=["group"])
def project_kernel(
    z_ptr,
    rstd_ptr,
    moments_ptr,
    folded_ptr,
    sums_partial_ptr,
    out_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    group,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN channels (by `program_id(1)`) of a and b, `[2h, P, P]`, over `group` tiles of BM positions.

    Moments `[4, P, P]` of z, and rstd `[P, P]`, zero in the padding and where the mask leaves a position out: the results
    there are zero by that. BM divides the padded square, whose sides are multiples of 16. The weights of both the linear
    part and the gate stay on the chip; one product gives both.
    """
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(group > 0)
    FULL: tl.constexpr = C == BC and 2 * H % BN == 0
    c = tl.arange(0, BC)
    t = tl.program_id(1) * BN + tl.arange(0, BN)
    area = padded.to(tl.int64) * padded
    # Rows of the linear part, then as many of the gate.
    both = tl.arange(0, 2 * BN)
    row = tl.program_id(1) * BN + both % BN + both // BN * (2 * H)
    if FULL:
        w = tl.load(folded_ptr + row[:, None] * C + c[None, :])
    else:
        real = (tl.program_id(1) * BN + both % BN < 2 * H)[:, None] & (c < C)[None, :]
        w = tl.load(folded_ptr + row[:, None] * C + c[None, :], mask=real, other=0.0)
    own = t < 2 * H
    e = tl.arange(0, 16)
    beside = beside_weights(
        sums_partial_ptr, row, both % BN + tl.program_id(1) * BN < 2 * H, e, 4 * H, w.dtype
    )
    m_rows = moment_of(e).to(tl.int64)[:, None] * area + tl.arange(0, BM)[None, :]
    first = tl.program_id(0) * group
    last = tl.minimum(first + group, (padded * padded + BM - 1) // BM)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BM
        inside, source, _ = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        if EVEN and C == BC:
            z = tl.load(z_ptr + source[:, None] + c[None, :])
        else:
            z = tl.load(
                z_ptr + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
            )
        moments = tl.load(moments_ptr + start + m_rows)
        rstd = tl.load(rstd_ptr + start + tl.arange(0, BM))
        products = tl.dot(z, tl.trans(w))
        products = tl.dot(tl.trans(moments), tl.trans(beside), products)
        linear, gate = tl.split(tl.permute(tl.reshape(products, (BM, 2, BN)), (0, 2, 1)))
        value = gated(linear * rstd[:, None], gate * rstd[:, None], FAST)
        value = tl.trans(value.to(out_ptr.dtype.element_ty))
        where = out_ptr + start + t.to(tl.int64)[:, None] * area + tl.arange(0, BM)[None, :]
        if FULL:
            tl.store(where, value)
        else:
            tl.store(where, value, mask=own[:, None])
