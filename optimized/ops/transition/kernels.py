"""Transition kernels for 16-bit products: the wide hidden layer lives in registers, forward and backward.

With n = LN(x):  a = n·w_aᵀ, b = n·w_bᵀ, h = swish(a)·b, y = h·w_outᵀ.

Backward, given dy (everything recomputed from x):
    dh = dy·w_out;  db = dh·swish(a);  da = dh·b·(σ(a) + swish(a)·(1 − σ(a)))
    dn = da·w_a + db·w_b, then the layer-norm backward
    dw_a = daᵀ·n, dw_b = dbᵀ·n, dw_out = dyᵀ·h

One GEMM unit is 2·rows·c·h FLOP: forward 3 units, `input_gradient` 5, `weight_gradient` 6 (three of them
recomputation). Bytes from memory: forward reads x and writes y; input_gradient reads x and dy and writes dx and
n; weight_gradient reads n and dy once per hidden chunk (from L2 mostly). Weights stream from L2.

Weight gradients are fp32 partial sums over fixed sets of rows, folded afterwards in a fixed order: no atomics.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate, add_share, normalise_rows, normalise_rows_backward, sigmoid


@triton.jit(repr=profiled_as("transition_forward"))
def forward_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    out_ptr,
    rows,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of BM rows: y = h·w_outᵀ, hidden chunk by hidden chunk."""
    dtype = w_ptr.dtype.element_ty
    wa_ptr = w_ptr
    wb_ptr = w_ptr + H * C
    wo_ptr = w_ptr + 2 * H * C
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    tile = m[:, None] * C + c[None, :]
    x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normal, _ = normalise_rows(x, c, eps, C)
    n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
    acc = tl.zeros([BM, BC], tl.float32)
    for start in tl.range(0, H, BN, num_stages=STAGES):
        j = start + tl.arange(0, BN)
        wide = j[:, None] * C + c[None, :]
        tall = c[:, None] * H + j[None, :]
        if C == BC and H % BN == 0:
            wa = tl.load(wa_ptr + wide)
            wb = tl.load(wb_ptr + wide)
            wo = tl.load(wo_ptr + tall)
        else:
            wa = tl.load(wa_ptr + wide, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)
            wb = tl.load(wb_ptr + wide, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)
            wo = tl.load(wo_ptr + tall, mask=(j < H)[None, :] & (c < C)[:, None], other=0.0)
        a = tl.dot(n, tl.trans(wa), input_precision="ieee")
        b = tl.dot(n, tl.trans(wb), input_precision="ieee")
        h = (a * sigmoid(a, FAST) * b).to(dtype)
        acc = accumulate(acc, h, tl.trans(wo))
    tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def hidden_gradients(a, b, dh, FAST: tl.constexpr):
    """From the pre-activations and dh: h, da, db (fp32)."""
    s = sigmoid(a, FAST)
    swish = a * s
    return swish * b, dh * b * (s + swish * (1.0 - s)), dh * swish


@triton.jit(repr=profiled_as("transition_input_gradient"), do_not_specialize=["group"])
def input_gradient_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    dy_ptr,
    dx_ptr,
    n_ptr,
    norm_partial_ptr,
    rows,
    group,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`group` consecutive tiles of BM rows: dx, n for the weight gradients, and the program's share of dγ and dβ."""
    dtype = w_ptr.dtype.element_ty
    wa_ptr = w_ptr
    wb_ptr = w_ptr + H * C
    wo_ptr = w_ptr + 2 * H * C
    c = tl.arange(0, BC)
    for step in range(group):
        m = (tl.program_id(0).to(tl.int64) * group + step) * BM + tl.arange(0, BM)
        inside = (m < rows)[:, None] & (c < C)[None, :]
        tile = m[:, None] * C + c[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        normal, _ = normalise_rows(x, c, eps, C)
        n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
        tl.store(n_ptr + tile, n, mask=inside)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(dtype)
        acc = tl.zeros([BM, BC], tl.float32)
        for start in tl.range(0, H, BN, num_stages=STAGES):
            j = start + tl.arange(0, BN)
            wide = j[:, None] * C + c[None, :]
            tall = c[:, None] * H + j[None, :]
            if C == BC and H % BN == 0:
                wa = tl.load(wa_ptr + wide)
                wb = tl.load(wb_ptr + wide)
                wo = tl.load(wo_ptr + tall)
            else:
                wa = tl.load(wa_ptr + wide, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)
                wb = tl.load(wb_ptr + wide, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)
                wo = tl.load(wo_ptr + tall, mask=(j < H)[None, :] & (c < C)[:, None], other=0.0)
            a = tl.dot(n, tl.trans(wa), input_precision="ieee")
            b = tl.dot(n, tl.trans(wb), input_precision="ieee")
            dh = tl.dot(dy, wo, input_precision="ieee")
            _h, da, db = hidden_gradients(a, b, dh, FAST)
            acc = accumulate(acc, da.to(dtype), wa)
            acc = accumulate(acc, db.to(dtype), wb)
        # The row tile is read again (from L2): keeping it would cost BM·BC registers through the loop.
        x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        normal, rstd = normalise_rows(x, c, eps, C)
        dx = normalise_rows_backward(acc, normal, gamma, rstd, C)
        tl.store(dx_ptr + tile, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        add_share(share_ptr, c, tl.sum(acc * normal, 0), step > 0, C)
        add_share(share_ptr + C, c, tl.sum(acc, 0), step > 0, C)


@triton.jit(repr=profiled_as("transition_weight_gradient"), do_not_specialize=["splits"])
def weight_gradient_kernel(
    n_ptr,
    dy_ptr,
    w_ptr,
    partial_ptr,
    rows,
    splits,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of BN hidden units over every `splits`-th row tile: partial dw_a, dw_b `[H, C]`, dw_out `[C, H]`."""
    dtype = w_ptr.dtype.element_ty
    wa_ptr = w_ptr
    wb_ptr = w_ptr + H * C
    wo_ptr = w_ptr + 2 * H * C
    split = tl.program_id(1)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    real = (c < C)[:, None] & (j < H)[None, :]
    wide = c[:, None] + j[None, :] * C
    tall = c[:, None] * H + j[None, :]
    wa = tl.load(wa_ptr + wide, mask=real, other=0.0)
    wb = tl.load(wb_ptr + wide, mask=real, other=0.0)
    wo = tl.load(wo_ptr + tall, mask=real, other=0.0)
    dwa = tl.zeros([BC, BN], tl.float32)
    dwb = tl.zeros([BC, BN], tl.float32)
    dwo = tl.zeros([BC, BN], tl.float32)
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        tile = m[:, None] * C + c[None, :]
        inside = (m < rows)[:, None] & (c < C)[None, :]
        n = tl.load(n_ptr + tile, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(dtype)
        a = tl.dot(n, wa, input_precision="ieee")
        b = tl.dot(n, wb, input_precision="ieee")
        dh = tl.dot(dy, wo, input_precision="ieee")
        h, da, db = hidden_gradients(a, b, dh, FAST)
        dwa = accumulate(dwa, tl.trans(n), da.to(dtype))
        dwb = accumulate(dwb, tl.trans(n), db.to(dtype))
        dwo = accumulate(dwo, tl.trans(dy), h.to(dtype))
    share = partial_ptr + split.to(tl.int64) * 3 * C * H
    tl.store(share + wide, dwa, mask=real)
    tl.store(share + C * H + wide, dwb, mask=real)
    tl.store(share + 2 * C * H + tall, dwo, mask=real)
