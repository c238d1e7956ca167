"""Statistics of the two layer norms of triangle multiplication, taken once for all kernels that multiply raw rows.

Those kernels (`folded`, `folded_output`) then bring their operands into the matrix unit as they lie, and no tile is
reduced across threads between two products: at 768 tokens that took a third of their time on an H200.

Sums are of differences to the first channel, so that a mean larger than the deviation cancels nothing. Bytes: the
tensor once, and 16 for every position: rstd, then -mean·rstd, in fp32, and four moments. Of z also rstd of the positions
that the mask keeps, zero elsewhere: with it the input projections need no mask, which they had to wait for in every step.

A z in float32, as under autocast, is normalised by a kernel of its own instead, and x̂ takes its place in bfloat16.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import normalise_rows
from optimized.ops.triangle_multiplication.project import keep_rows

MOMENTS = 4
"""Rows of moments of x or of z: 1 / rstd in two parts, -mean in two parts."""


@triton.jit
def put_statistics(stats_ptr, p, area, real, inside, first, total, squares, eps, CHANNELS: tl.constexpr):
    """From the sum and the sum of squares of differences to `first`; real positions that are not inside get zeros.

    Returns rstd and -mean·rstd.
    """
    off = total / CHANNELS
    rstd = tl.rsqrt(tl.maximum(squares / CHANNELS - off * off, 0.0) + eps)
    rstd = tl.where(inside, rstd, 0.0)
    shift = -(first + off) * rstd
    tl.store(stats_ptr + p, rstd, mask=real)
    tl.store(stats_ptr + area + p, shift, mask=real)
    return rstd, shift


@triton.jit
def put_moments(moments_ptr, p, area, real, rstd, shift):
    """1 / rstd and -mean, each as two numbers: what the first leaves is the second. Zero where rstd is."""
    deviation = tl.where(rstd > 0.0, 1.0 / tl.where(rstd > 0.0, rstd, 1.0), 0.0)
    less_mean = shift * deviation
    for k in tl.static_range(2):
        value = deviation if k == 0 else less_mean
        high = value.to(moments_ptr.dtype.element_ty)
        low = (value - high.to(tl.float32)).to(moments_ptr.dtype.element_ty)
        tl.store(moments_ptr + 2 * k * area + p, high, mask=real)
        tl.store(moments_ptr + (2 * k + 1) * area + p, low, mask=real)


@triton.jit
def put_kept(stats_ptr, mask_ptr, p, area, i, j, n_tokens, padded, rstd, MASKED: tl.constexpr):
    """The third plane of the statistics of z: rstd where the mask `[N, N]` keeps a pair of the square."""
    inside = (i < n_tokens) & (j < n_tokens)
    keep = keep_rows(mask_ptr, inside, i.to(tl.int64) * n_tokens + j, MASKED)
    tl.store(stats_ptr + 2 * area + p, tl.where(keep, rstd, 0.0), mask=j < padded)


@triton.jit(repr=profiled_as("triangle_multiplication_moments"))
def moments_kernel(stats_ptr, moments_ptr, padded, BLOCK: tl.constexpr):
    """Moments `[8, P, P]` of the statistics `[5, P, P]`, BLOCK positions of x or z; zero in the padding."""
    area = padded.to(tl.int64) * padded
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stats = stats_ptr + 2 * tl.program_id(1) * area + p
    rstd = tl.load(stats, mask=p < area, other=0.0)
    shift = tl.load(stats + area, mask=p < area, other=0.0)
    put_moments(moments_ptr + 4 * tl.program_id(1) * area, p, area, p < area, rstd, shift)


@triton.jit
def rows_of_block(z_ptr, n_tokens, stride_i, stride_j, BLOCK: tl.constexpr):
    """Row i = `program_id(1)`, BLOCK columns j of the padded square, whether inside the real one, and where their rows begin."""
    i = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < n_tokens) & (j < n_tokens)
    return i, j, inside, z_ptr + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j


@triton.jit(repr=profiled_as("triangle_multiplication_z_statistics"))
def z_kernel(
    z_ptr,
    mask_ptr,
    stats_ptr,
    moments_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    eps,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`[3, P, P]` of the rows of z `[N, N, c]` and their moments `[4, P, P]`, zero in the padding; BLOCK positions of row
    `program_id(1)`.

    CHANNELS at a time: four lanes hold a row, and its sums need two exchanges between lanes, not four or five.
    """
    area = padded.to(tl.int64) * padded
    i, j, inside, rows = rows_of_block(z_ptr, n_tokens, stride_i, stride_j, BLOCK)
    first = tl.load(rows, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK, CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for start in tl.static_range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        z = tl.load(rows[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        off = z.to(tl.float32) - first[:, None]
        if start + CHANNELS > C:
            off = tl.where((c < C)[None, :], off, 0.0)
        total += off
        squares += off * off
    p = i.to(tl.int64) * padded + j
    total, squares = tl.sum(total, 1), tl.sum(squares, 1)
    rstd, shift = put_statistics(stats_ptr, p, area, j < padded, inside, first, total, squares, eps, C)
    put_kept(stats_ptr, mask_ptr, p, area, i, j, n_tokens, padded, rstd, MASKED)
    put_moments(moments_ptr, p, area, j < padded, rstd, shift)


@triton.jit(repr=profiled_as("triangle_multiplication_x_statistics"))
def x_kernel(
    x_ptr,
    stats_ptr,
    moments_ptr,
    n_tokens,
    padded,
    eps,
    H: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`[2, P, P]` of the columns of the contraction x `[h, P, P]` and their moments `[4, P, P]`; CHANNELS at a time of
    BLOCK positions of a row."""
    area = padded.to(tl.int64) * padded
    i = tl.program_id(1)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < n_tokens) & (j < n_tokens)
    p = i.to(tl.int64) * padded + j
    first = tl.load(x_ptr + p, mask=j < padded, other=0.0).to(tl.float32)
    total = tl.zeros([CHANNELS, BLOCK], tl.float32)
    squares = tl.zeros([CHANNELS, BLOCK], tl.float32)
    for start in tl.static_range(0, H, CHANNELS):
        h = start + tl.arange(0, CHANNELS)
        real = (h < H)[:, None] & (j < padded)[None, :]
        x = tl.load(x_ptr + h.to(tl.int64)[:, None] * area + p[None, :], mask=real, other=0.0)
        off = x.to(tl.float32) - first[None, :]
        if start + CHANNELS > H:
            off = tl.where((h < H)[:, None], off, 0.0)
        total += off
        squares += off * off
    total, squares = tl.sum(total, 0), tl.sum(squares, 0)
    rstd, shift = put_statistics(stats_ptr, p, area, j < padded, inside, first, total, squares, eps, H)
    put_moments(moments_ptr, p, area, j < padded, rstd, shift)


@triton.jit(repr=profiled_as("triangle_multiplication_normalise"))
def normalise_kernel(
    z_ptr,
    mask_ptr,
    normal_ptr,
    stats_ptr,
    moments_ptr,
    rstd_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x̂ of the rows of z, in fp32, rounded, `[N, N, c]`; rstd `[P, P]`; statistics and moments of rows that are normalised.

    Those, 1 and 0 inside the square and 0 outside, are what kernels that normalise raw rows find in their place.
    """
    c = tl.arange(0, BC)
    area = padded.to(tl.int64) * padded
    i, j, inside, rows = rows_of_block(z_ptr, n_tokens, stride_i, stride_j, BLOCK)
    real = inside[:, None] & (c < C)[None, :]
    z = tl.load(rows[:, None] + c[None, :], mask=real, other=0.0)
    normal, rstd = normalise_rows(z.to(tl.float32), c, eps, C)
    dense = i.to(tl.int64) * n_tokens + j
    normal = normal.to(normal_ptr.dtype.element_ty)
    tl.store(normal_ptr + dense[:, None] * C + c[None, :], normal, mask=real)
    p = i.to(tl.int64) * padded + j
    tl.store(rstd_ptr + p, tl.where(inside, rstd, 0.0), mask=j < padded)
    one, nothing = inside.to(tl.float32), tl.zeros_like(rstd)
    tl.store(stats_ptr + p, one, mask=j < padded)
    tl.store(stats_ptr + area + p, nothing, mask=j < padded)
    put_kept(stats_ptr, mask_ptr, p, area, i, j, n_tokens, padded, one, MASKED)
    put_moments(moments_ptr, p, area, j < padded, one, nothing)
