"""Backward kernel of triangle multiplication's input projections that reads channel-major tensors as they lie.

Channels are the rows of the recomputed products, so that the gradients of a and b come by asynchronous copies in
the order of memory, and what is computed from them goes to the next product in registers or by the matrix unit's
transposed reading of shared memory. Statistics are kept from the first normalisation to the last, and sums over
positions stay in registers from tile to tile, until the program's end. For products in 16 bits only.

One GEMM unit is 2·N²·c·h FLOP: 8 units, as its namesake in `project`, which has float32, and one more where the gate's
share of dn comes as what it is a product of. It reads z twice (the second time from L2), the gradients of a and b and
the gate's share, and writes dz and LN(z).
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import normalise_rows_backward, sigmoid
from optimized.ops.triangle_multiplication.folded import place_rows, scale_and_shift
from optimized.ops.triangle_multiplication.project import keep_rows, load_weights

SHARE_ROWS = tl.constexpr(8)
"""Rows of the sums over positions that a program keeps: as many as four warps read at a time at 128 channels."""


@triton.jit
def standardised_rows(x, rstd, shift, columns, C: tl.constexpr):
    """(x - mean) · rstd of every row in fp32, zero in the padding columns; `shift` is -mean · rstd."""
    normal = x.to(tl.float32) * rstd[:, None] + shift[:, None]
    if x.shape[1] != C:
        normal = tl.where((columns < C)[None, :], normal, 0.0)
    return normal


@triton.jit
def some_rows(x, ROWS: tl.constexpr):
    """Rows r, r + ROWS, r + 2·ROWS ... of the tile, added up: `[ROWS, BC]`."""
    return tl.sum(tl.reshape(x, (x.shape[0] // ROWS, ROWS, x.shape[1])), 0)


@triton.jit(repr=profiled_as("triangle_multiplication_input_gradient"), do_not_specialize=["group"])
def input_gradient_kernel(
    z_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    mask_ptr,
    grad_ptr,
    dn_gate_ptr,
    dz_ptr,
    n_ptr,
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
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    GATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz of `group` tiles of BM positions from the gradients of a and b `[2h, P, P]` and the gate's dn `[N·N, c]`.

    GATE: in place of dn, rstd · d of the gate, `[c, P, P]`, as `folded_output` leaves it; the product is made here.
    Also writes mask · n `[P·P, c]` for the weight gradients, and the program's share of dγ and dβ.
    """
    FULL: tl.constexpr = C == BC and 2 * H % BN == 0
    dtype = w_ptr.dtype.element_ty
    c = tl.arange(0, BC)
    area = padded.to(tl.int64) * padded
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    d_gamma = tl.zeros([SHARE_ROWS, BC], tl.float32)
    d_beta = tl.zeros([SHARE_ROWS, BC], tl.float32)
    for step in range(group):
        start = (tl.program_id(0) * group + step) * BM
        p = start + tl.arange(0, BM)
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        keep = keep_rows(mask_ptr, inside, dense, MASKED)
        rows = z_ptr + source[:, None] + c[None, :]
        real = inside[:, None] & (c < C)[None, :]
        z = tl.load(rows, mask=real, other=0.0)
        rstd, shift = scale_and_shift(z, c, eps, C)
        n = standardised_rows(z, rstd, shift, c, C) * gamma[None, :] + beta[None, :]
        if MASKED or not EVEN:
            n = tl.where(keep[:, None], n, 0.0)
        n = n.to(dtype)
        within = (p < area)[:, None] & (c < C)[None, :]
        tl.store(n_ptr + p.to(tl.int64)[:, None] * C + c[None, :], n, mask=within)
        dn = tl.zeros([BM, BC], tl.float32)
        if GATE:
            for channel in tl.range(0, C, BN, num_stages=STAGES):
                t = channel + tl.arange(0, BN)
                where = dn_gate_ptr + t.to(tl.int64)[:, None] * area + p[None, :]
                d_gate = tl.load(where, mask=(t < C)[:, None] & (p < area)[None, :], other=0.0)
                cells = w_ptr + 5 * H * C + t[:, None] * C + c[None, :]
                wg = tl.load(cells, mask=(t < C)[:, None] & (c < C)[None, :], other=0.0)
                dn = tl.dot(tl.trans(d_gate), wg, dn)
            dn *= (1.0 / rstd)[:, None]
        for channel in tl.range(0, 2 * H, BN, num_stages=STAGES):
            t = channel + tl.arange(0, BN)
            wp, wg = load_weights(w_ptr, t, c, H, C, FULL)
            where = grad_ptr + t.to(tl.int64)[:, None] * area + p[None, :]
            grad = tl.load(where, mask=keep[None, :] & (t < 2 * H)[:, None], other=0.0).to(tl.float32)
            linear = tl.dot(wp, tl.trans(n))
            gate = sigmoid(tl.dot(wg, tl.trans(n)), FAST)
            d_linear = grad * gate
            d_gate = d_linear * linear * (1.0 - gate)
            dn = tl.dot(tl.trans(d_linear.to(dtype)), wp, dn)
            dn = tl.dot(tl.trans(d_gate.to(dtype)), wg, dn)
        cells = dense[:, None] * C + c[None, :]
        if not GATE:
            dn += tl.load(dn_gate_ptr + cells, mask=real, other=0.0).to(tl.float32)
        # z is read again (from L2): keeping the tile would cost BM·BC registers through the loop.
        normal = standardised_rows(tl.load(rows, mask=real, other=0.0), rstd, shift, c, C)
        d_beta += some_rows(dn, SHARE_ROWS)
        d_gamma += some_rows(dn * normal, SHARE_ROWS)
        dz = normalise_rows_backward(dn, normal, gamma, rstd, C)
        tl.store(dz_ptr + cells, dz.to(dz_ptr.dtype.element_ty), mask=real)
    share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(share_ptr + c, tl.sum(d_gamma, 0), mask=c < C)
    tl.store(share_ptr + C + c, tl.sum(d_beta, 0), mask=c < C)
