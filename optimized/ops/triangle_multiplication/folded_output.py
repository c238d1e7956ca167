"""Output side of triangle multiplication from raw rows and their statistics, forward and backward.

With n = LN(x) = γ ⊙ x̂ + β and w' = γ ⊙ w less its mean over h, folded as in `folded`, a row of the output projection is
u + β·w, where u = rstd · (x·w' - mean · Σw'), and its gradients need neither n nor its gradient:

- dx = rstd · (g - x̂ · Σ_t d_t u_t / h), where d is the gradient of the projected row and g = Σ_t d_t w'_t: the two means
  over h that layer norm takes off are that of g, which the folded rows do not have, and that of g ⊙ x̂, which is the sum
  over t. Both products multiply by w', and no tile is reduced over h.
- dw_t = γ ⊙ m_t + β · Σ d_t, dγ = Σ_t w_t ⊙ m_t and dβ = Σ_t w_t · Σ d_t, where m_t = Σ (rstd · d_t) · (x - mean), the
  sums without t over positions: the norm's gradients are read off those of the weights.

d is therefore kept as rstd · d, rounded once; the gate's likewise, with the statistics of z. So x, z and dy go from
memory into the matrix unit as they lie and nothing normalised is written. Channels are the rows of all products: what
is computed between them leaves as memory lies, and sums over positions are sums over columns.

Σ d and m's Σ (rstd · d) · mean are products too, of d with the moments of every position: 1 / rstd and -mean, each as
two bfloat16 numbers, which hold 16 bits of it. (In registers they cost more instructions; and Triton gives a tile that
is both read into registers and multiplied a buffer too few, so that the next tile is written while products in flight
still read it.)

For bfloat16: in float16 rstd · d could leave the range in which gradients were scaled to lie.

One GEMM unit is 2·N²·c·h FLOP: `forward` 2 units, `backward` 3, `weight` 2. Bytes: `forward` reads x and z and writes y,
`backward` reads x, z, dy and writes dx and the two d, `weight` reads these, x and z. The gate's gradient to LN(z) is a
product of its d and its weights for the library: the chip has no room for the weights as they are beside the folded ones.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import fast_tanh
from optimized.ops.triangle_multiplication.folded import beside_weights, moment_of, place_rows
from optimized.ops.triangle_multiplication.output import load_weights


@triton.jit
def folded_tanh(gate, FAST: tl.constexpr):
    """2σ - 1 of a gate whose weights hold the sigmoid's factor: see `folded`. With half of another factor beside it, no
    constant is: x · σ = x/2 + x/2 · (2σ - 1)."""
    if FAST:
        return fast_tanh(gate)
    else:
        return 2.0 / (1.0 + tl.exp2(gate)) - 1.0


@triton.jit
def both_moments_of(e):
    """Which row of the moments of x and z column e of a joint tile is: six of z for the gate, then six of x."""
    return tl.where(e < 6, 4 + moment_of(e), tl.where(e < 12, moment_of(e - 6), 0))


@triton.jit
def load_raw(
    x_ptr, z_ptr, stats_ptr, x_rows, source, inside, start, c, h, area,
    C: tl.constexpr, H: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """x `[BH, BM]` and z `[BM, BC]` of a tile as they lie, rstd and shift of x, and rstd of z."""
    z_cells = source[:, None] + c[None, :]
    if FULL:
        x = tl.load(x_ptr + start + x_rows)
    else:
        x = tl.load(x_ptr + start + x_rows, mask=(h < H)[:, None], other=0.0)
    if EVEN and FULL:
        z = tl.load(z_ptr + z_cells)
    else:
        z = tl.load(z_ptr + z_cells, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    stats = stats_ptr + start + tl.arange(0, BM)
    rstd = tl.load(stats)
    shift = tl.load(stats + area)
    rstd_z = tl.load(stats + 2 * area)
    return x, z, rstd, shift, rstd_z


@triton.jit(repr=profiled_as("triangle_multiplication_output_folded"), do_not_specialize=["group"])
def forward_kernel(
    x_ptr,
    z_ptr,
    stats_ptr,
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
    BH: tl.constexpr,
    FAST: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN channels (by `program_id(1)`) of y `[N·N, c]` of `group` tiles of BM positions, from raw rows of x and z.

    stats `[5, P, P]` and moments `[8, P, P]` of x, then of z. EVEN: as in `folded`.
    """
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(group > 0)
    FULL: tl.constexpr = C == BC and H == BH and C % BN == 0
    t = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    own = t < C
    wo, wg = load_weights(folded_ptr, t, c, h, C, H, FULL)
    e = tl.arange(0, 16)
    sums_ptr = sums_partial_ptr + 8 * H
    beside_gate = beside_weights(sums_ptr + 2 * C, t, own, e, C, wg.dtype)
    beside_linear = beside_weights(sums_ptr, t, own, e - 6, C, wo.dtype)
    x_rows = h.to(tl.int64)[:, None] * area + tl.arange(0, BM)[None, :]
    m_rows = both_moments_of(e).to(tl.int64)[:, None] * area + tl.arange(0, BM)[None, :]
    first = tl.program_id(0) * group
    last = tl.minimum(first + group, (n_tokens * padded + BM - 1) // BM)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BM
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        x, z, rstd, _, rstd_z = load_raw(
            x_ptr, z_ptr, stats_ptr, x_rows, source, inside, start, c, h, area, C, H, FULL, EVEN, BM
        )
        moments = tl.load(moments_ptr + start + m_rows)
        gate = tl.dot(beside_gate, moments, tl.dot(wg, tl.trans(z)))
        linear = tl.dot(beside_linear, moments, tl.dot(wo, x))
        gate = folded_tanh(gate * rstd_z[None, :], FAST)
        linear = linear * (0.5 * rstd)[None, :]
        y = tl.trans((linear * gate + linear).to(out_ptr.dtype.element_ty))
        cells = out_ptr + dense[:, None] * C + t[None, :]
        if EVEN and FULL:
            tl.store(cells, y)
        else:
            tl.store(cells, y, mask=inside[:, None] & own[None, :])


@triton.jit(repr=profiled_as("triangle_multiplication_output_backward_folded"), do_not_specialize=["group"])
def backward_kernel(
    x_ptr,
    z_ptr,
    stats_ptr,
    moments_ptr,
    folded_ptr,
    sums_partial_ptr,
    dy_ptr,
    dx_ptr,
    d_linear_ptr,
    d_gate_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    group,
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
    """dx `[h, P, P]` of `group` tiles of BM positions, and rstd · d of output projection and gate, `[c, P, P]` each.

    The padding is zero in all three. moments `[8, P, P]` of x, then of z: see `folded`. BM divides the padded square,
    whose sides are multiples of 16. The folded weights of all c channels, for which BN rows are enough, stay on the chip;
    the next tiles are on their way meanwhile. EVEN: as in `folded`; nothing is masked then.
    """
    tl.static_assert(BN >= C, "a tile holds all output channels")
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(group > 0)
    FULL: tl.constexpr = C == BC and H == BH and C == BN
    dtype = folded_ptr.dtype.element_ty
    t = tl.arange(0, BN)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    own = t < C
    wo, wg = load_weights(folded_ptr, t, c, h, C, H, FULL)
    e = tl.arange(0, 16)
    sums_ptr = sums_partial_ptr + 8 * H
    beside_gate = beside_weights(sums_ptr + 2 * C, t, own, e, C, wg.dtype)
    beside_linear = beside_weights(sums_ptr, t, own, e - 6, C, wo.dtype)
    bias = tl.load(sums_ptr + C + t, mask=own, other=0.0)
    # Rows of a tile, to which the loop adds a number that is one for all threads.
    k = tl.arange(0, BM)
    x_rows = h.to(tl.int64)[:, None] * area + k[None, :]
    d_rows = t.to(tl.int64)[:, None] * area + k[None, :]
    m_rows = both_moments_of(e).to(tl.int64)[:, None] * area + k[None, :]
    first = tl.program_id(0) * group
    last = tl.minimum(first + group, (padded * padded + BM - 1) // BM)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BM
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        x, z, rstd, shift, rstd_z = load_raw(
            x_ptr, z_ptr, stats_ptr, x_rows, source, inside, start, c, h, area, C, H, FULL, EVEN, BM
        )
        dy_cells = dense[:, None] * C + t[None, :]
        if EVEN and FULL:
            dy = tl.load(dy_ptr + dy_cells)
        else:
            dy = tl.load(dy_ptr + dy_cells, mask=inside[:, None] & own[None, :], other=0.0)
        moments = tl.load(moments_ptr + start + m_rows)
        gate = tl.dot(beside_gate, moments, tl.dot(wg, tl.trans(z)))
        linear = tl.dot(beside_linear, moments, tl.dot(wo, x))
        gate = folded_tanh(gate * rstd_z[None, :], FAST)
        # The projected row is rstd · linear, and u that less its bias.
        d_linear = tl.trans(dy).to(tl.float32) * (0.5 * rstd)[None, :]
        d_linear = d_linear * gate + d_linear
        half = (0.5 * rstd_z)[None, :]
        d_gate = d_linear * linear * (half - gate * half)
        second = tl.sum(d_linear * (linear * rstd[None, :] - bias[:, None]), 0) / H
        d_linear = d_linear.to(dtype)
        d_gate = d_gate.to(dtype)
        if FULL:
            tl.store(d_linear_ptr + start + d_rows, d_linear)
            tl.store(d_gate_ptr + start + d_rows, d_gate)
        else:
            tl.store(d_linear_ptr + start + d_rows, d_linear, mask=own[:, None])
            tl.store(d_gate_ptr + start + d_rows, d_gate, mask=own[:, None])
        dx = tl.dot(tl.trans(wo), d_linear)
        normal = x.to(tl.float32) * rstd[None, :] + shift[None, :]
        dx = (dx - normal * second[None, :]).to(dtype)
        if FULL:
            tl.store(dx_ptr + start + x_rows, dx)
        else:
            tl.store(dx_ptr + start + x_rows, dx, mask=(h < H)[:, None])


@triton.jit
def weight_rows(
    d_ptr,
    v_ptr,
    moments_ptr,
    first,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    splits,
    C: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """m `[BN, BK]` and Σ d `[BN]` of channels `first` on, over every `splits`-th tile of BM positions.

    v is x `[K, P, P]` where CHANNELS, else z. In the padding d is zero and v finite.
    """
    t = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # A product has at least 16 columns: each of the four rows of moments four times.
    e = tl.arange(0, 16)
    area = padded.to(tl.int64) * padded
    acc = tl.zeros([BN, BK], tl.float32)
    sums = tl.zeros([BN, 16], tl.float32)
    for step in tl.range(tl.program_id(1), (padded * padded + BM - 1) // BM, splits, num_stages=STAGES):
        start = step * BM
        p = start + tl.arange(0, BM)
        d_cells = t.to(tl.int64)[:, None] * area + p[None, :]
        if C % BN == 0:
            d = tl.load(d_ptr + d_cells)
        else:
            d = tl.load(d_ptr + d_cells, mask=(t < C)[:, None], other=0.0)
        if CHANNELS:
            v_cells = k.to(tl.int64)[:, None] * area + p[None, :]
            if K == BK:
                v = tl.load(v_ptr + v_cells)
            else:
                v = tl.load(v_ptr + v_cells, mask=(k < K)[:, None], other=0.0)
        else:
            inside, source, _ = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
            v_cells = source[:, None] + k[None, :]
            if EVEN and K == BK:
                v = tl.load(v_ptr + v_cells)
            else:
                v = tl.load(v_ptr + v_cells, mask=inside[:, None] & (k < K)[None, :], other=0.0)
        moments = tl.load(moments_ptr + (e % 4).to(tl.int64)[:, None] * area + p[None, :])
        acc = tl.dot(d, tl.trans(v) if CHANNELS else v, acc)
        sums = tl.dot(d, tl.trans(moments), sums)
    total = tl.sum(tl.where((e < 2)[None, :], sums, 0.0), 1)
    means = tl.sum(tl.where(((e >= 2) & (e < 4))[None, :], sums, 0.0), 1)
    return acc + means[:, None], total


@triton.jit(repr=profiled_as("triangle_multiplication_output_weight_folded"), do_not_specialize=["splits"])
def weight_kernel(
    d_linear_ptr,
    d_gate_ptr,
    x_ptr,
    z_ptr,
    moments_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    w_ptr,
    dw_partial_ptr,
    norm_partial_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    splits,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial gradients of BN rows of out `[c, h]` or g `[c, c]`, and with the former shares of the output norm's dγ, dβ.

    The gate's share of the input norm's is in the gradient to LN(z), which `gradients` sums.
    """
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(splits > 0)
    CHUNKS: tl.constexpr = (C + BN - 1) // BN
    chunk = tl.program_id(0) % CHUNKS
    t = chunk * BN + tl.arange(0, BN)
    own = t < C
    area = padded.to(tl.int64) * padded
    partial_ptr = dw_partial_ptr + tl.program_id(1).to(tl.int64) * (C * (H + C))
    if tl.program_id(0) < CHUNKS:
        m, total = weight_rows(
            d_linear_ptr, x_ptr, moments_ptr, chunk * BN, n_tokens, padded, stride_i, stride_j, splits,
            C, H, BH, True, EVEN, BM, BN, STAGES,
        )  # fmt: skip
        h = tl.arange(0, BH)
        gamma = tl.load(gamma_x_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        beta = tl.load(beta_x_ptr + h, mask=h < H, other=0.0).to(tl.float32)
        cells = t[:, None] * H + h[None, :]
        real = own[:, None] & (h < H)[None, :]
        tl.store(partial_ptr + cells, m * gamma[None, :] + total[:, None] * beta[None, :], mask=real)
        w = tl.load(w_ptr + 4 * H * C + cells, mask=real, other=0.0).to(tl.float32)
        share_ptr = norm_partial_ptr + (tl.program_id(1) * CHUNKS + chunk).to(tl.int64) * (2 * H)
        tl.store(share_ptr + h, tl.sum(w * m, 0), mask=h < H)
        tl.store(share_ptr + H + h, tl.sum(w * total[:, None], 0), mask=h < H)
    else:
        m, total = weight_rows(
            d_gate_ptr, z_ptr, moments_ptr + 4 * area, chunk * BN, n_tokens, padded, stride_i, stride_j, splits,
            C, C, BC, False, EVEN, BM, BN, STAGES,
        )  # fmt: skip
        c = tl.arange(0, BC)
        gamma = tl.load(gamma_z_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_z_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        cells = C * H + t[:, None] * C + c[None, :]
        real = own[:, None] & (c < C)[None, :]
        tl.store(partial_ptr + cells, m * gamma[None, :] + total[:, None] * beta[None, :], mask=real)
