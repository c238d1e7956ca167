"""Backward kernel of triangle multiplication's input projections that reads channel-major tensors as they lie.

Channels are the rows of the recomputed products, so that the gradients of a and b come by asynchronous copies in
the order of memory, and what is computed from them goes to the next product in registers or by the matrix unit's
transposed reading of shared memory. Statistics are kept from the first normalisation to the last, and sums over
positions stay in registers from tile to tile, until the program's end. For products in 16 bits only.

One GEMM unit is 2·N²·c·h FLOP: 8 units, as its namesake in `project`, which has float32. It reads z twice (the second
time from L2), the gradients of a and b and the gate's share of dn, and writes dz and LN(z) / 2, which is what the
recomputed products take: see `gated_gradients`.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import normalise_rows_backward
from optimized.ops.triangle_multiplication.folded import place_rows, scale_and_shift
from optimized.ops.triangle_multiplication.project import gated_gradients, keep_rows, load_weights

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
    stats_ptr,
    rstd_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    mask_ptr,
    grad_ptr,
    dn_gate_ptr,
    dz_ptr,
    n_ptr,
    norm_partial_ptr,
    more_ptr,
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
    KEPT: tl.constexpr,
    NORMAL: tl.constexpr,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz of `group` tiles of BM positions from the gradients of a and b `[2h, P, P]` and the gate's dn `[N·N, c]`.

    KEPT: statistics are those that the forward pass kept for `folded_output`, and the gate's dn is rstd · dn `[P·P, c]`.
    NORMAL: z is x̂ of what dz is the gradient to, and rstd `[P, P]` that one's.
    MORE: another gradient of z `[N·N, c]` is added to dz.
    Also writes mask · n / 2 `[P·P, c]` for the weight gradients, and the program's share of dγ and dβ.
    """
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(n_tokens > 0)
    tl.assume(padded > 0)
    tl.assume(stride_i >= 0)
    tl.assume(stride_j >= 0)
    tl.assume(group > 0)
    FULL: tl.constexpr = C == BC and 2 * H % BN == 0
    # dn and its sums are so many times what they should be, until the end: see `gated_gradients`.
    TIMES: tl.constexpr = 2.0 if FAST else 1.0
    dtype = w_ptr.dtype.element_ty
    c = tl.arange(0, BC)
    area = padded.to(tl.int64) * padded
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    d_gamma = tl.zeros([SHARE_ROWS, BC], tl.float32)
    d_beta = tl.zeros([SHARE_ROWS, BC], tl.float32)
    # What does not change from tile to tile is computed again in each: it would be spilled beside the loop inside.
    for step in tl.range(0, group, disable_licm=True):
        start = (tl.program_id(0) * group + step) * BM
        p = start + tl.arange(0, BM)
        inside, source, dense = place_rows(start, n_tokens, padded, stride_i, stride_j, BM, EVEN)
        keep = keep_rows(mask_ptr, inside, dense, MASKED)
        rows = z_ptr + source[:, None] + c[None, :]
        real = inside[:, None] & (c < C)[None, :]
        z = tl.load(rows, mask=real, other=0.0)
        if KEPT:
            stats = stats_ptr + 2 * area + p
            rstd = tl.load(stats, mask=inside, other=1.0)
            shift = tl.load(stats + area, mask=inside, other=0.0)
        else:
            rstd, shift = scale_and_shift(z, c, eps, C)
        n = standardised_rows(z, rstd, shift, c, C) * (0.5 * gamma)[None, :] + (0.5 * beta)[None, :]
        if MASKED or not EVEN:
            n = tl.where(keep[:, None], n, 0.0)
        n = n.to(dtype)
        within = (p < area)[:, None] & (c < C)[None, :]
        tl.store(n_ptr + p.to(tl.int64)[:, None] * C + c[None, :], n, mask=within)
        dn = tl.zeros([BM, BC], tl.float32)
        for channel in tl.range(0, 2 * H, BN, num_stages=STAGES):
            t = channel + tl.arange(0, BN)
            wp, wg = load_weights(w_ptr, t, c, H, C, FULL)
            where = grad_ptr + t.to(tl.int64)[:, None] * area + p[None, :]
            if EVEN and FULL:
                grad = tl.load(where, mask=inside[None, :], other=0.0).to(tl.float32)
            else:
                grad = tl.load(where, mask=(p < area)[None, :] & (t < 2 * H)[:, None], other=0.0).to(
                    tl.float32
                )
            linear = tl.dot(wp, tl.trans(n))
            gate = tl.dot(wg, tl.trans(n))
            d_linear, d_gate = gated_gradients(grad, linear, gate, FAST)
            dn = tl.dot(tl.trans(d_linear.to(dtype)), wp, dn)
            dn = tl.dot(tl.trans(d_gate.to(dtype)), wg, dn)
        if MASKED or not EVEN:
            # Not of the gradients as they are read: a mask of their positions would make that 2 bytes at a time.
            dn = tl.where(keep[:, None], dn, 0.0)
        cells = dense[:, None] * C + c[None, :]
        if KEPT:
            square = p.to(tl.int64)[:, None] * C + c[None, :]
            of_gate = tl.load(dn_gate_ptr + square, mask=real, other=0.0).to(tl.float32)
            dn += of_gate * (TIMES / rstd)[:, None]
        else:
            dn += tl.load(dn_gate_ptr + cells, mask=real, other=0.0).to(tl.float32) * TIMES
        # z is read again (from L2): keeping the tile would cost BM·BC registers through the loop.
        normal = standardised_rows(tl.load(rows, mask=real, other=0.0), rstd, shift, c, C)
        d_beta += some_rows(dn, SHARE_ROWS)
        d_gamma += some_rows(dn * normal, SHARE_ROWS)
        if NORMAL:
            rstd = tl.load(rstd_ptr + p, mask=inside, other=1.0)
        dz = normalise_rows_backward(dn, normal, gamma, rstd * (1.0 / TIMES), C)
        if MORE:
            dz += tl.load(more_ptr + cells, mask=real, other=0.0).to(tl.float32)
        tl.store(dz_ptr + cells, dz.to(dz_ptr.dtype.element_ty), mask=real)
    share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(share_ptr + c, tl.sum(d_gamma, 0) * (1.0 / TIMES), mask=c < C)
    tl.store(share_ptr + C + c, tl.sum(d_beta, 0) * (1.0 / TIMES), mask=c < C)
