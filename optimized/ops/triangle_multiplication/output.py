"""Output side of triangle multiplication: LN(x)·outᵀ ⊙ σ(LN(z)·gᵀ), forward and backward.

x is the contraction, `[h, P, P]` channel by channel with its padding zero. LN(x), LN(z) and the gate are
recomputed wherever they are needed; nothing else is saved.

One GEMM unit is 2·N²·c·h FLOP: forward 2 units, backward 4, and 2 for the weight gradients (`products`).
Bytes: forward reads x and z and writes y; backward reads x, z, dy and writes dx, the gate's dn and the four
operands of the weight gradients, which read them once. Recomputing them took three times as long.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import (
    accumulate,
    add_share,
    normalise_rows_backward,
    normalised,
    row_statistics,
    sigmoid,
)
from optimized.ops.triangle_multiplication.project import load_rows, pair_rows


@triton.jit
def load_columns(x_ptr, gamma_ptr, beta_ptr, p, h, area, eps, H: tl.constexpr, EXACT: tl.constexpr):
    """Layer-normed tile `[BM, BH]` of the channel-major x (fp32), its normalised values, mean, rstd and γ."""
    where = x_ptr + h.to(tl.int64)[None, :] * area + p[:, None]
    x = tl.load(where, mask=(p < area)[:, None] & (h < H)[None, :], other=0.0)
    gamma = tl.load(gamma_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    x = x.to(tl.float32)
    mean, rstd = row_statistics(x, h, eps, H, EXACT)
    normal = normalised(x, mean, rstd, h, H)
    return normal * gamma[None, :] + beta[None, :], normal, mean, rstd, gamma


@triton.jit
def load_weights(w_ptr, t, c, h, C: tl.constexpr, H: tl.constexpr, FULL: tl.constexpr):
    """Rows t of the output projection `[BN, BH]` and of the gate `[BN, BC]`, which follow the input projections.

    FULL: every row and column is real.
    """
    wo_ptr = w_ptr + 4 * H * C
    wg_ptr = w_ptr + 5 * H * C
    if FULL:
        wo = tl.load(wo_ptr + t[:, None] * H + h[None, :])
        wg = tl.load(wg_ptr + t[:, None] * C + c[None, :])
    else:
        wo = tl.load(
            wo_ptr + t[:, None] * H + h[None, :], mask=(t < C)[:, None] & (h < H)[None, :], other=0.0
        )
        wg = tl.load(
            wg_ptr + t[:, None] * C + c[None, :], mask=(t < C)[:, None] & (c < C)[None, :], other=0.0
        )
    return wo, wg


@triton.jit(repr=profiled_as("triangle_multiplication_output_forward"), do_not_specialize=["group"])
def forward_kernel(
    x_ptr,
    z_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    w_ptr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y `[N·N, c]` of `group` tiles of BM positions, BN output channels at a time.

    Where BN covers c, the program keeps the weights on the chip and the loop over tiles is pipelined.
    """
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(group > 0)
    RESIDENT: tl.constexpr = BN >= C
    FULL: tl.constexpr = C == BC and H == BH and C % BN == 0
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    if RESIDENT:
        wo, wg = load_weights(w_ptr, tl.arange(0, BN), c, h, C, H, FULL)
    for step in tl.range(0, group, num_stages=STAGES):
        p = (tl.program_id(0) * group + step) * BM + tl.arange(0, BM)
        inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
        nx, _, _, _, _ = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H, EXACT)
        nz, _, _, _, _ = load_rows(z_ptr, gamma_z_ptr, beta_z_ptr, source, inside, c, eps, C, EXACT)
        nx = nx.to(dtype)
        nz = nz.to(dtype)
        for start in tl.range(0, C, BN, num_stages=STAGES):
            t = start + tl.arange(0, BN)
            if not RESIDENT:
                wo, wg = load_weights(w_ptr, t, c, h, C, H, FULL)
            gate = sigmoid(tl.dot(nz, tl.trans(wg), input_precision="ieee"), FAST, EXACT)
            linear = tl.dot(nx, tl.trans(wo), input_precision="ieee")
            y = (linear * gate).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + dense[:, None] * C + t[None, :], y, mask=inside[:, None] & (t < C)[None, :])


@triton.jit(repr=profiled_as("triangle_multiplication_output_backward"), do_not_specialize=["group"])
def backward_kernel(
    x_ptr,
    z_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    dn_ptr,
    nx_ptr,
    nz_ptr,
    d_linear_ptr,
    d_gate_ptr,
    norm_partial_ptr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx `[h, P, P]` (padding zero), the gate's gradient to LN(z) `[N·N, c]`, shares of the output norm's dγ, dβ.

    Also what the weight gradients are made of: LN(x) `[N·N, h]`, LN(z), d_linear and d_gate `[N·N, c]`.
    Where BN covers c, the program keeps the weights on the chip and the loop over tiles is pipelined.
    """
    RESIDENT: tl.constexpr = BN >= C
    FULL: tl.constexpr = C == BC and H == BH and C % BN == 0
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    if RESIDENT:
        wo, wg = load_weights(w_ptr, tl.arange(0, BN), c, h, C, H, FULL)
    for step in tl.range(0, group, num_stages=STAGES):
        p = (tl.program_id(0) * group + step) * BM + tl.arange(0, BM)
        inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
        nx, _, _, _, _ = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H, EXACT)
        nz, _, _, _, _ = load_rows(z_ptr, gamma_z_ptr, beta_z_ptr, source, inside, c, eps, C, EXACT)
        nx = nx.to(dtype)
        nz = nz.to(dtype)
        real = inside[:, None] & (c < C)[None, :]
        tl.store(nx_ptr + dense[:, None] * H + h[None, :], nx, mask=inside[:, None] & (h < H)[None, :])
        tl.store(nz_ptr + dense[:, None] * C + c[None, :], nz, mask=real)
        dnx = tl.zeros([BM, BH], tl.float32)
        dnz = tl.zeros([BM, BC], tl.float32)
        for start in tl.range(0, C, BN, num_stages=STAGES):
            t = start + tl.arange(0, BN)
            if not RESIDENT:
                wo, wg = load_weights(w_ptr, t, c, h, C, H, FULL)
            cells = dense[:, None] * C + t[None, :]
            own = inside[:, None] & (t < C)[None, :]
            dy = tl.load(dy_ptr + cells, mask=own, other=0.0).to(tl.float32)
            gate = sigmoid(tl.dot(nz, tl.trans(wg), input_precision="ieee"), FAST, EXACT)
            linear = tl.dot(nx, tl.trans(wo), input_precision="ieee")
            d_linear = dy * gate
            d_gate = (d_linear * linear * (1.0 - gate)).to(dtype)
            d_linear = d_linear.to(dtype)
            tl.store(d_linear_ptr + cells, d_linear, mask=own)
            tl.store(d_gate_ptr + cells, d_gate, mask=own)
            dnx = accumulate(dnx, d_linear, wo)
            dnz = accumulate(dnz, d_gate, wg)
        tl.store(dn_ptr + dense[:, None] * C + c[None, :], dnz.to(dn_ptr.dtype.element_ty), mask=real)
        # x is read again (from L2): keeping the tile would cost BM·BH registers.
        _, normal, _, rstd, gamma = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H, EXACT)
        dx = normalise_rows_backward(dnx, normal, gamma, rstd, H)
        where = dx_ptr + h.to(tl.int64)[None, :] * area + p[:, None]
        tl.store(where, dx.to(dx_ptr.dtype.element_ty), mask=(p < area)[:, None] & (h < H)[None, :])
        share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * H
        add_share(share_ptr, h, tl.sum(dnx * normal, 0), step > 0, H)
        add_share(share_ptr + H, h, tl.sum(dnx, 0), step > 0, H)
