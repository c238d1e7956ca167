"""Output side of triangle multiplication, backward, from raw rows and the statistics that the forward pass kept.

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

For bfloat16: in float16 rstd · d could leave the range in which gradients were scaled to lie.

One GEMM unit is 2·N²·c·h FLOP: `backward` 3 units, `weight` 2. Bytes: `backward` reads x, z, dy and writes dx and the two
d, `weight` reads these, x and z. The gate's gradient to LN(z) is a product of its d and its weights for the library: with
the weights as they are beside the folded ones, two programs would not fit on a multiprocessor.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.folded import place_rows
from optimized.ops.triangle_multiplication.output import load_weights

RUN = tl.constexpr(8)
"""Positions that a thread reads at a time: 16 bytes."""


@triton.jit(repr=profiled_as("triangle_multiplication_output_backward_folded"), do_not_specialize=["group"])
def backward_kernel(
    x_ptr,
    z_ptr,
    stats_ptr,
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

    The padding is zero in all three. The folded weights of all c channels, for which BN rows are enough, stay on the
    chip; the next tiles are on their way meanwhile. EVEN: as in `folded`; nothing is masked then.
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
    sums = sums_partial_ptr + 8 * H + t
    rest = tl.load(sums, mask=own, other=0.0)
    bias = tl.load(sums + C, mask=own, other=0.0)
    gate_sum = tl.load(sums + 2 * C, mask=own, other=0.0)
    gate_bias = tl.load(sums + 3 * C, mask=own, other=0.0)
    # Rows of a tile, to which the loop adds a number that is one for all threads.
    k = tl.arange(0, BM)
    x_rows = h.to(tl.int64)[:, None] * area + k[None, :]
    d_rows = t.to(tl.int64)[:, None] * area + k[None, :]
    first = tl.program_id(0) * group
    last = tl.minimum(first + group, (padded * padded + BM - 1) // BM)
    for step in tl.range(first, last, num_stages=STAGES):
        start = step * BM
        p = start + tl.arange(0, BM)
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        z_cells = source[:, None] + c[None, :]
        dy_cells = dense[:, None] * C + t[None, :]
        stats = stats_ptr + p
        if EVEN and FULL:
            x = tl.load(x_ptr + start + x_rows)
            z = tl.load(z_ptr + z_cells)
            dy = tl.load(dy_ptr + dy_cells)
            rstd = tl.load(stats)
            shift = tl.load(stats + area)
            rstd_z = tl.load(stats + 2 * area)
            shift_z = tl.load(stats + 3 * area)
        else:
            x = tl.load(x_ptr + start + x_rows, mask=(h < H)[:, None] & (p < area)[None, :], other=0.0)
            z = tl.load(z_ptr + z_cells, mask=inside[:, None] & (c < C)[None, :], other=0.0)
            dy = tl.load(dy_ptr + dy_cells, mask=inside[:, None] & own[None, :], other=0.0)
            rstd = tl.load(stats, mask=inside, other=0.0)
            shift = tl.load(stats + area, mask=inside, other=0.0)
            rstd_z = tl.load(stats + 2 * area, mask=inside, other=0.0)
            shift_z = tl.load(stats + 3 * area, mask=inside, other=0.0)
        gate = tl.dot(wg, tl.trans(z))
        linear = tl.dot(wo, x)
        gate = gate * rstd_z[None, :] + (gate_sum[:, None] * shift_z[None, :] + gate_bias[:, None])
        linear = linear * rstd[None, :] + rest[:, None] * shift[None, :]
        if FAST:
            tanh = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1
            )
            gate = tanh * 0.5 + 0.5
        else:
            gate = 1.0 / (1.0 + tl.exp2(gate))
        d_linear = tl.trans(dy).to(tl.float32) * gate
        d_gate = d_linear * (linear + bias[:, None]) * (1.0 - gate)
        d_linear = (d_linear * rstd[None, :]).to(dtype)
        d_gate = (d_gate * rstd_z[None, :]).to(dtype)
        if EVEN and FULL:
            tl.store(d_linear_ptr + start + d_rows, d_linear)
            tl.store(d_gate_ptr + start + d_rows, d_gate)
        else:
            real = own[:, None] & (p < area)[None, :]
            tl.store(d_linear_ptr + start + d_rows, d_linear, mask=real)
            tl.store(d_gate_ptr + start + d_rows, d_gate, mask=real)
        second = tl.sum(d_linear.to(tl.float32) * linear, 0) / H
        dx = tl.dot(tl.trans(wo), d_linear)
        normal = x.to(tl.float32) * rstd[None, :] + shift[None, :]
        dx = (dx - normal * second[None, :]).to(dtype)
        if EVEN and FULL:
            tl.store(dx_ptr + start + x_rows, dx)
        else:
            tl.store(dx_ptr + start + x_rows, dx, mask=(h < H)[:, None] & (p < area)[None, :])


@triton.jit
def weight_rows(
    d_ptr,
    v_ptr,
    stats_ptr,
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

    v is x `[K, P, P]` where CHANNELS, else z. What is summed apart are the products with the means, in fp32.
    """
    t = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    area = padded.to(tl.int64) * padded
    acc = tl.zeros([BN, BK], tl.float32)
    # Sums of the positions that one thread holds: those of others are added once, at the end.
    means = tl.zeros([BN, BM // RUN], tl.float32)
    total = tl.zeros([BN, BM // RUN], tl.float32)
    for step in tl.range(tl.program_id(1), (padded * padded + BM - 1) // BM, splits, num_stages=STAGES):
        start = step * BM
        p = start + tl.arange(0, BM)
        inside, source, _ = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        d_cells = t.to(tl.int64)[:, None] * area + p[None, :]
        v_cells = k.to(tl.int64)[:, None] * area + p[None, :] if CHANNELS else source[:, None] + k[None, :]
        if EVEN and C % BN == 0 and K == BK:
            d = tl.load(d_ptr + d_cells)
            v = tl.load(v_ptr + v_cells)
            rstd = tl.load(stats_ptr + p)
            shift = tl.load(stats_ptr + area + p)
        else:
            d = tl.load(d_ptr + d_cells, mask=(t < C)[:, None] & (p < area)[None, :], other=0.0)
            real = (k < K)[:, None] & (p < area)[None, :] if CHANNELS else inside[:, None] & (k < K)[None, :]
            v = tl.load(v_ptr + v_cells, mask=real, other=0.0)
            # Of padding positions d is zero: any statistics do.
            rstd = tl.load(stats_ptr + p, mask=inside, other=1.0)
            shift = tl.load(stats_ptr + area + p, mask=inside, other=0.0)
        acc = tl.dot(d, tl.trans(v) if CHANNELS else v, acc)
        deviation = 1.0 / rstd
        d = d.to(tl.float32)
        total += tl.sum(tl.reshape(d * deviation[None, :], (BN, BM // RUN, RUN)), 2)
        means += tl.sum(tl.reshape(d * (shift * deviation)[None, :], (BN, BM // RUN, RUN)), 2)
    return acc + tl.sum(means, 1)[:, None], tl.sum(total, 1)


@triton.jit(repr=profiled_as("triangle_multiplication_output_weight_folded"), do_not_specialize=["splits"])
def weight_kernel(
    d_linear_ptr,
    d_gate_ptr,
    x_ptr,
    z_ptr,
    stats_ptr,
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
            d_linear_ptr, x_ptr, stats_ptr, chunk * BN, n_tokens, padded, stride_i, stride_j, splits,
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
            d_gate_ptr, z_ptr, stats_ptr + 2 * area, chunk * BN, n_tokens, padded, stride_i, stride_j, splits,
            C, C, BC, False, EVEN, BM, BN, STAGES,
        )  # fmt: skip
        c = tl.arange(0, BC)
        gamma = tl.load(gamma_z_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_z_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        cells = C * H + t[:, None] * C + c[None, :]
        real = own[:, None] & (c < C)[None, :]
        tl.store(partial_ptr + cells, m * gamma[None, :] + total[:, None] * beta[None, :], mask=real)
