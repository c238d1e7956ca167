"""Gated input projections of triangle multiplication, forward and backward.

With n = LN(z):  a = mask · σ(n·a_gᵀ) ⊙ n·a_pᵀ, and b likewise. Both are written channel by channel as P×P
matrices (P = N rounded up to 16, padding zero), so that the contraction is plain aligned matrix products.

The four weights come as one matrix `[4h, c]`: a_p, b_p, a_g, b_g. Channel t of the `[2h, P, P]` result is
σ(n·w[2h + t]) · (n·w[t]).

One GEMM unit is 2·N²·c·h FLOP: forward 4 units, `input_gradient` 8, `weight_gradient` 8 (4 recomputed).
The forward kernel is for float32 and for inputs in another dtype than the products (`folded` has the one for the rest),
the input gradient for float32 (`gradients` has the one for 16 bits).
Bytes: forward reads z and writes 2 tensors of its size; input_gradient reads z, the two gradients and the
gate's share of dn and writes dz and n; weight_gradient reads n and the two gradients.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import (
    accumulate,
    add_share,
    fast_tanh,
    normalise_rows,
    normalise_rows_backward,
    normalised,
    row_statistics,
    sigmoid,
)


@triton.jit
def pair_rows(p, n_tokens, padded, stride_i, stride_j):
    """Of flat positions in the padded square: whether inside, offset in z, index in the dense N·N square."""
    i = p // padded
    j = p % padded
    inside = (i < n_tokens) & (j < n_tokens)
    source = i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
    dense = i.to(tl.int64) * n_tokens + j
    return inside, source, dense


@triton.jit
def load_rows(z_ptr, gamma_ptr, beta_ptr, source, inside, c, eps, C: tl.constexpr, EXACT: tl.constexpr):
    """Layer-normed rows of z (fp32), their normalised values, mean, rstd and γ."""
    z = tl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    z = z.to(tl.float32)
    mean, rstd = row_statistics(z, c, eps, C, EXACT)
    normal = normalised(z, mean, rstd, c, C)
    return normal * gamma[None, :] + beta[None, :], normal, mean, rstd, gamma


@triton.jit
def keep_rows(mask_ptr, inside, dense, MASKED: tl.constexpr):
    """Inside the square and not masked."""
    if MASKED:
        inside = inside & (tl.load(mask_ptr + dense, mask=inside, other=0) != 0)
    return inside


@triton.jit
def doubled(FAST: tl.constexpr):
    """What `gated_gradients` come multiplied by."""
    return 2.0 if FAST else 1.0


@triton.jit
def gated_gradients(grad, linear, gate, FAST: tl.constexpr, EXACT: tl.constexpr = False):
    """Gradients of linear part and gate, from the gradient of linear · σ(gate) and half of both, products of n / 2.

    With T = tanh(gate / 2) = 2σ - 1 the first is grad · (1 + T) / 2 and the second that times linear · (1 - T) / 2: FAST, for
    bfloat16, gives them doubled, so that no constant is left beside T. In float16 that would cost range.
    """
    if FAST:
        t = fast_tanh(gate)
        d_linear = grad * t + grad
        d_gate = d_linear * (linear - linear * t)
    else:
        s = sigmoid(2.0 * gate, FAST, EXACT)
        d_linear = grad * s
        d_gate = d_linear * (2.0 * linear) * (1.0 - s)
    return d_linear, d_gate


@triton.jit
def load_weights(w_ptr, t, c, H: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Rows t of the projections and of their gates, `[BN, BC]` each; FULL: every row and column is real."""
    cells = t[:, None] * C + c[None, :]
    if FULL:
        wp = tl.load(w_ptr + cells)
        wg = tl.load(w_ptr + 2 * H * C + cells)
    else:
        real = (t < 2 * H)[:, None] & (c < C)[None, :]
        wp = tl.load(w_ptr + cells, mask=real, other=0.0)
        wg = tl.load(w_ptr + 2 * H * C + cells, mask=real, other=0.0)
    return wp, wg


@triton.jit(repr=profiled_as("triangle_multiplication_project_forward"), do_not_specialize=["group"])
def forward_kernel(
    z_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """a or b (by `program_id(1)`) of `group` tiles of BM positions, BN of the h channels at a time.

    Where BN covers h, the program keeps its weights on the chip and the loop over tiles is pipelined.
    """
    RESIDENT: tl.constexpr = BN >= H
    FULL: tl.constexpr = C == BC and H % BN == 0
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    c = tl.arange(0, BC)
    first = tl.program_id(1) * H
    area = padded.to(tl.int64) * padded
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if RESIDENT:
        wp, wg = load_weights(w_ptr, first + tl.arange(0, BN), c, H, C, FULL)
    for step in tl.range(0, group, num_stages=STAGES):
        p = (tl.program_id(0) * group + step) * BM + tl.arange(0, BM)
        inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
        keep = keep_rows(mask_ptr, inside, dense, MASKED)
        z = tl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
        normal, _ = normalise_rows(z.to(tl.float32), c, eps, C, EXACT)
        n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
        for start in tl.range(0, H, BN, num_stages=STAGES):
            t = first + start + tl.arange(0, BN)
            if not RESIDENT:
                wp, wg = load_weights(w_ptr, t, c, H, C, FULL)
            linear = tl.dot(n, tl.trans(wp), input_precision="ieee")
            gate = tl.dot(n, tl.trans(wg), input_precision="ieee")
            value = tl.where(keep[:, None], linear * sigmoid(gate, FAST, EXACT), 0.0)
            where = out_ptr + t.to(tl.int64)[None, :] * area + p[:, None]
            own = (p < area)[:, None] & (t < first + H)[None, :]
            tl.store(where, value.to(out_ptr.dtype.element_ty), mask=own)


@triton.jit(repr=profiled_as("triangle_multiplication_project_input_gradient"), do_not_specialize=["group"])
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
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dz of `group` tiles of BM positions from the gradients of a and b `[2h, P, P]` and the gate's dn `[N·N, c]`.

    MORE: another gradient of z `[N·N, c]` is added to dz.
    Also writes mask · n / 2 `[P·P, c]` for the weight gradients, and the program's share of dγ and dβ.
    """
    FULL: tl.constexpr = C == BC and 2 * H % BN == 0
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    c = tl.arange(0, BC)
    area = padded.to(tl.int64) * padded
    for step in range(group):
        p = (tl.program_id(0) * group + step) * BM + tl.arange(0, BM)
        inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
        keep = keep_rows(mask_ptr, inside, dense, MASKED)
        n, _, _, _, _ = load_rows(z_ptr, gamma_ptr, beta_ptr, source, inside, c, eps, C, EXACT)
        n = tl.where(keep[:, None], n * 0.5, 0.0).to(dtype)
        square = (p < area)[:, None]
        tl.store(n_ptr + p.to(tl.int64)[:, None] * C + c[None, :], n, mask=square & (c < C)[None, :])
        acc = tl.zeros([BM, BC], tl.float32)
        for start in tl.range(0, 2 * H, BN, num_stages=STAGES):
            t = start + tl.arange(0, BN)
            wp, wg = load_weights(w_ptr, t, c, H, C, FULL)
            where = grad_ptr + t.to(tl.int64)[None, :] * area + p[:, None]
            grad = tl.load(where, mask=keep[:, None] & (t < 2 * H)[None, :], other=0.0).to(tl.float32)
            linear = tl.dot(n, tl.trans(wp), input_precision="ieee")
            gate = tl.dot(n, tl.trans(wg), input_precision="ieee")
            d_linear, d_gate = gated_gradients(grad, linear, gate, FAST, EXACT)
            acc = accumulate(acc, d_linear.to(dtype), wp)
            acc = accumulate(acc, d_gate.to(dtype), wg)
        tile = dense[:, None] * C + c[None, :]
        valid = inside[:, None] & (c < C)[None, :]
        acc = acc * (1.0 / doubled(FAST)) + tl.load(dn_gate_ptr + tile, mask=valid, other=0.0).to(tl.float32)
        # z is read again (from L2): keeping the tile would cost BM·BC registers through the loop.
        _, normal, _, rstd, gamma = load_rows(z_ptr, gamma_ptr, beta_ptr, source, inside, c, eps, C, EXACT)
        dz = normalise_rows_backward(acc, normal, gamma, rstd, C)
        if MORE:
            dz += tl.load(more_ptr + tile, mask=valid, other=0.0).to(tl.float32)
        tl.store(dz_ptr + tile, dz.to(dz_ptr.dtype.element_ty), mask=valid)
        share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        add_share(share_ptr, c, tl.sum(acc * normal, 0), step > 0, C)
        add_share(share_ptr + C, c, tl.sum(acc, 0), step > 0, C)


@triton.jit(repr=profiled_as("triangle_multiplication_project_weight_gradient"), do_not_specialize=["splits"])
def weight_gradient_kernel(
    n_ptr,
    grad_ptr,
    w_ptr,
    partial_ptr,
    area,
    splits,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    TURNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial gradients `[4h, c]` of the packed weights for BN channels over every `splits`-th tile of positions of n / 2.

    TURNED: channels are the rows of every product. The gate's gradients then go from one product to the next in
    registers, and the gradients of a and b are read as they lie; else positions are the rows of the recomputation.
    """
    FULL: tl.constexpr = C == BC and 2 * H % BN == 0
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    split = tl.program_id(1)
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    wp, wg = load_weights(w_ptr, t, c, H, C, FULL)
    if TURNED:
        dwp = tl.zeros([BN, BC], tl.float32)
        dwg = tl.zeros([BN, BC], tl.float32)
    else:
        dwp = tl.zeros([BC, BN], tl.float32)
        dwg = tl.zeros([BC, BN], tl.float32)
    for start in tl.range(split * BM, area, splits * BM, num_stages=STAGES):
        p = tl.arange(0, BM) + start
        inside = p < area
        n = tl.load(
            n_ptr + p.to(tl.int64)[:, None] * C + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        if TURNED:
            where = grad_ptr + t.to(tl.int64)[:, None] * area + p[None, :]
            grad = tl.load(where, mask=inside[None, :] & (t < 2 * H)[:, None], other=0.0).to(tl.float32)
            linear = tl.dot(wp, tl.trans(n), input_precision="ieee")
            gate = tl.dot(wg, tl.trans(n), input_precision="ieee")
            d_linear, d_gate = gated_gradients(grad, linear, gate, FAST, EXACT)
            dwp = accumulate(dwp, d_linear.to(dtype), n)
            dwg = accumulate(dwg, d_gate.to(dtype), n)
        else:
            where = grad_ptr + t.to(tl.int64)[None, :] * area + p[:, None]
            grad = tl.load(where, mask=inside[:, None] & (t < 2 * H)[None, :], other=0.0).to(tl.float32)
            linear = tl.dot(n, tl.trans(wp), input_precision="ieee")
            gate = tl.dot(n, tl.trans(wg), input_precision="ieee")
            d_linear, d_gate = gated_gradients(grad, linear, gate, FAST, EXACT)
            dwp = accumulate(dwp, tl.trans(n), d_linear.to(dtype))
            dwg = accumulate(dwg, tl.trans(n), d_gate.to(dtype))
    dwp *= 2.0 / doubled(FAST)
    dwg *= 2.0 / doubled(FAST)
    share = partial_ptr + split.to(tl.int64) * 4 * H * C
    if TURNED:
        cells = t[:, None] * C + c[None, :]
        real = (t < 2 * H)[:, None] & (c < C)[None, :]
    else:
        cells = c[:, None] + t[None, :] * C
        real = (c < C)[:, None] & (t < 2 * H)[None, :]
    tl.store(share + cells, dwp, mask=real)
    tl.store(share + 2 * H * C + cells, dwg, mask=real)
