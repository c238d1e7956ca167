"""Forward kernels of triangle multiplication that multiply the raw rows and normalise the products.

With γ and β folded into a weight row w, LN(z)·w = rstd · (z·w') - rstd·mean · Σw' + β·w, where w' = γ ⊙ w is rounded
to the compute dtype and Σw' sums what was rounded: the result is that of (z - mean)·w' whatever the mean, with one
rounding where the definition has two (LN(z) and w). So z and x go from memory into the matrix unit as they lie, by
asynchronous copies several tiles ahead, and no normalised tile is written to shared memory; the registers see them
for their statistics only. Channels are the rows of the input projections' products, positions those of the output's,
so that nothing is transposed in shared memory on the way in.

It needs z in the compute dtype, 16 bits wide: `project` and `output` have the kernels for everything else.

The sigmoid's own factor is folded into the weights too: 1/2 for linear part and gate where it is the hardware's tanh,
-log2(e) for the gate where it is an exponential. `folded` holds the six matrices as `pack_weights` orders them;
`sums` `[2, 4h + 2c]` holds Σw' and β·w of every row, in fp32.

One GEMM unit is 2·N²·c·h FLOP: the input projections are 4 units, the output 2. Bytes: each reads what the kernel it
stands for reads, and writes the same. Statistics, once per BN channels: some 5 operations a value.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.project import keep_rows, pair_rows


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
def row_statistics(z, c, eps, C: tl.constexpr):
    """rstd and -mean·rstd of every row of a tile `[BM, BC]` whose padding columns are zero; two passes in fp32."""
    x = z.to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = x - mean[:, None]
    if x.shape[1] != C:
        centred = tl.where((c < C)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return rstd, -mean * rstd


@triton.jit
def column_moments(x, h, eps, H: tl.constexpr):
    """Mean and rstd of every column of a channel-major tile `[BH, BM]` whose padding rows are zero."""
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / H
    centred = x - mean[None, :]
    if x.shape[0] != H:
        centred = tl.where((h < H)[:, None], centred, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 0) / H + eps)


@triton.jit
def gated(linear, gate, FAST: tl.constexpr):
    """linear · σ(gate) of products whose weights hold the factors of `fold_weights_kernel`."""
    if FAST:
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1
        )
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
    gamma_x_ptr,
    beta_x_ptr,
    plain_ptr,
    folded_ptr,
    sums_partial_ptr,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    FAST: tl.constexpr,
    PLAIN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of matrix `program_id(1)`, folded and rounded, and their two sums; PLAIN: as they are, too."""
    which = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    source = a_p_ptr
    scale_ptr = gamma_ptr
    shift_ptr = beta_ptr
    rows = H
    width = C
    first = which * H
    cells = first * C
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
        scale_ptr = gamma_x_ptr
        shift_ptr = beta_x_ptr
        rows = C
        width = H
    elif which == 5:
        source = g_ptr
        factor = tl.full([], GATE, tl.float32)
        rows = C
        first = 4 * H + C
        cells = 4 * H * C + C * H
    real = (r < rows)[:, None] & (k < width)[None, :]
    gamma = tl.load(scale_ptr + k, mask=k < width, other=0.0).to(tl.float32)
    beta = tl.load(shift_ptr + k, mask=k < width, other=0.0).to(tl.float32)
    w = tl.load(source + r[:, None] * width + k[None, :], mask=real, other=0.0).to(tl.float32)
    if PLAIN:
        plain = w.to(plain_ptr.dtype.element_ty)
        tl.store(plain_ptr + cells + r[:, None] * width + k[None, :], plain, mask=real)
    w *= factor
    folded = (w * gamma[None, :]).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + cells + r[:, None] * width + k[None, :], folded, mask=real)
    tl.store(sums_partial_ptr + first + r, tl.sum(folded.to(tl.float32), 1), mask=r < rows)
    biases = sums_partial_ptr + 4 * H + 2 * C + first + r
    tl.store(biases, tl.sum(w * beta[None, :], 1), mask=r < rows)


@triton.jit(repr=profiled_as("triangle_multiplication_project_folded"), do_not_specialize=["group"])
def project_kernel(
    z_ptr,
    folded_ptr,
    sums_partial_ptr,
    mask_ptr,
    out_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    group,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN channels (by `program_id(1)`) of a and b, `[2h, P, P]`, over `group` tiles of BM positions.

    The weights of both the linear part and the gate stay on the chip; one product gives both.
    """
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
    sum_linear = tl.load(sums_partial_ptr + t, mask=own, other=0.0)
    sum_gate = tl.load(sums_partial_ptr + 2 * H + t, mask=own, other=0.0)
    bias_ptr = sums_partial_ptr + 4 * H + 2 * C
    bias_linear = tl.load(bias_ptr + t, mask=own, other=0.0)
    bias_gate = tl.load(bias_ptr + 2 * H + t, mask=own, other=0.0)
    for step in tl.range(0, group, num_stages=STAGES):
        start = (tl.program_id(0) * group + step) * BM
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        z = tl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        rstd, shift = row_statistics(z, c, eps, C)
        products = tl.dot(w, tl.trans(z))
        linear, gate = tl.split(tl.permute(tl.reshape(products, (2, BN, BM)), (1, 2, 0)))
        shift = shift[None, :]
        rstd = rstd[None, :]
        linear = linear * rstd + (sum_linear[:, None] * shift + bias_linear[:, None])
        gate = gate * rstd + (sum_gate[:, None] * shift + bias_gate[:, None])
        value = gated(linear, gate, FAST)
        if MASKED or not EVEN:
            keep = keep_rows(mask_ptr, inside, dense, MASKED)
            value = tl.where(keep[None, :], value, 0.0)
        p = start + tl.arange(0, BM)
        where = out_ptr + t.to(tl.int64)[:, None] * area + p[None, :]
        tl.store(where, value.to(out_ptr.dtype.element_ty), mask=own[:, None] & (p < area)[None, :])


@triton.jit
def store_output(
    out_ptr, linear, gate, start, t, n_tokens, padded, some, C: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """One tile `[BM, BN]` of y from `start` on, if `some`."""
    inside, _, dense = place_rows(start, n_tokens, padded, 0, 0, linear.shape[0], EVEN)
    y = gated(linear, gate, FAST).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + dense[:, None] * C + t[None, :], y, mask=(inside & some)[:, None] & (t < C)[None, :])


@triton.jit(repr=profiled_as("triangle_multiplication_output_folded"), do_not_specialize=["group"])
def output_kernel(
    x_ptr,
    z_ptr,
    folded_ptr,
    sums_partial_ptr,
    out_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    group,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN channels (by `program_id(1)`) of y `[N·N, c]` over `group` tiles of BM positions; the weights stay.

    A tile's gate is applied, and the tile stored, at the beginning of the next step, while that step's x and z are
    on their way: there is no shared memory for a second pair of them beside the weights.
    """
    FULL: tl.constexpr = C == BC and H == BH and C % BN == 0
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    t = tl.program_id(1) * BN + tl.arange(0, BN)
    own = t < C
    area = padded.to(tl.int64) * padded
    wo_ptr = folded_ptr + 4 * H * C
    wg_ptr = folded_ptr + 5 * H * C
    if FULL:
        wo = tl.load(wo_ptr + t[:, None] * H + h[None, :])
        wg = tl.load(wg_ptr + t[:, None] * C + c[None, :])
    else:
        wo = tl.load(wo_ptr + t[:, None] * H + h[None, :], mask=own[:, None] & (h < H)[None, :], other=0.0)
        wg = tl.load(wg_ptr + t[:, None] * C + c[None, :], mask=own[:, None] & (c < C)[None, :], other=0.0)
    sums_ptr = sums_partial_ptr + 4 * H + t
    biases_ptr = sums_ptr + 4 * H + 2 * C
    first = tl.program_id(0) * group * BM
    linear = tl.zeros([BM, BN], tl.float32)
    gate = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, group, num_stages=STAGES):
        start = first + step * BM
        store_output(out_ptr, linear, gate, start - BM, t, n_tokens, padded, step > 0, C, FAST, EVEN)
        p = start + tl.arange(0, BM)
        at = x_ptr + h.to(tl.int64)[:, None] * area + p[None, :]
        x = tl.load(at, mask=(p < area)[None, :] & (h < H)[:, None], other=0.0)
        mean, rstd = column_moments(x, h, eps, H)
        shift = -mean * rstd
        linear = tl.dot(tl.trans(x), tl.trans(wo))
        # Read in every step: the vectors of both products in registers would take as many as the products.
        sums = tl.load(sums_ptr, mask=own, other=0.0)
        biases = tl.load(biases_ptr, mask=own, other=0.0)
        linear = linear * rstd[:, None] + (sums[None, :] * shift[:, None] + biases[None, :])
        inside, source, _ = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        z = tl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        rstd, shift = row_statistics(z, c, eps, C)
        gate = tl.dot(z, tl.trans(wg))
        sums = tl.load(sums_ptr + C, mask=own, other=0.0)
        biases = tl.load(biases_ptr + C, mask=own, other=0.0)
        gate = gate * rstd[:, None] + (sums[None, :] * shift[:, None] + biases[None, :])
    last = first + (group - 1) * BM
    store_output(out_ptr, linear, gate, last, t, n_tokens, padded, group > 0, C, FAST, EVEN)
