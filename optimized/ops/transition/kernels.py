"""Transition kernels for 16-bit products: the wide hidden layer lives in registers, forward and backward.

With n = LN(x):  a = n·w_aᵀ, b = n·w_bᵀ, h = swish(a)·b, y = h·w_outᵀ. The result is y, or x + y.

Backward, given dy (everything recomputed from x):
    dh = dy·w_out;  db = dh·swish(a);  da = dh·b·(σ(a) + swish(a)·(1 − σ(a)))
    dn = da·w_a + db·w_b, then the layer-norm backward
    dw_a = daᵀ·n, dw_b = dbᵀ·n, dw_out = dyᵀ·h

The products take n / 2 (exact in binary), so that with A = a / 2, B = b / 2 and g = 2σ(a) = 1 + tanh(A) no constants
are left in the innermost loops: swish(a) = A·g, h / 2 = swish·B, db = dh·swish, da = dh·B·(g + swish·(2 − g)); y and
the weight gradients are doubled at the end.

One GEMM unit is 2·rows·c·h FLOP: forward 3 units, `input_gradient` 5, `weight_gradient` 6 (three of them
recomputation). Bytes from memory: forward reads x and writes y; input_gradient reads x and dy and writes dx and
n / 2; weight_gradient reads n / 2 and dy once per hidden chunk (from L2 mostly). Weights stream from L2.

Weight gradients are fp32 partial sums over fixed sets of rows, folded afterwards in a fixed order: no atomics.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import (
    accumulate,
    as_memory_lies,
    fast_tanh,
    finish_rows,
    normalised,
    row_statistics,
)


@triton.jit
def gate(a, FAST: tl.constexpr):
    """2σ(2a) = 1 + tanh(a) in fp32; FAST: with NVIDIA's tanh instruction, as `sigmoid`."""
    if FAST:
        return fast_tanh(a) + 1.0
    else:
        return 2.0 / (1.0 + tl.exp2(a * -2.8853900817779268))


@triton.jit
def swish_of_half(a, FAST: tl.constexpr):
    """swish(2a) = 2a · σ(2a) in fp32, with FAST in one instruction less."""
    if FAST:
        return a * fast_tanh(a) + a
    else:
        return a * gate(a, False)


@triton.jit
def multiply(x, y, FAST: tl.constexpr):
    """x·y in their 16-bit dtype, rounded once; FAST, for bf16: two at a time (the compiler takes them one by one)."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r",
            [x, y],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        return (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype)


@triton.jit
def load_chunk(w_ptr, start, c, C: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):
    """Rows `start` to `start + BN` of w_a or w_b, `[BN, BC]`; FULL: every row and column is real."""
    j = start + tl.arange(0, BN)
    cells = w_ptr + j[:, None] * C + c[None, :]
    if FULL:
        return tl.load(cells)
    else:
        return tl.load(cells, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def load_out(w_ptr, start, c, C: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):
    """Columns `start` to `start + BN` of w_out, `[BC, BN]`; FULL as in `load_chunk`."""
    j = start + tl.arange(0, BN)
    cells = w_ptr + c[:, None] * H + j[None, :]
    if FULL:
        return tl.load(cells)
    else:
        return tl.load(cells, mask=(j < H)[None, :] & (c < C)[:, None], other=0.0)


@triton.jit
def load_pair(w_ptr, start, c, C: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, FULL: tl.constexpr):
    """Rows `start` to `start + BN` of w_a and of w_b in turns of eight, `[2·BN, BC]`: one product computes a and b.

    Eight columns are what a row of a matrix instruction's result is made of: a thread then has the same columns of
    a, of b and of dh, and nothing moves between threads.
    """
    r = tl.arange(0, 2 * BN)
    j = start + r // 16 * 8 + r % 8
    cells = w_ptr + (r // 8 % 2 * (H * C) + j * C)[:, None] + c[None, :]
    if FULL:
        return tl.load(cells)
    else:
        return tl.load(cells, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def apart(pair):
    """a and b `[R, BN]` of the product with `load_pair`'s rows `[R, 2·BN]`."""
    R: tl.constexpr = pair.shape[0]
    BN: tl.constexpr = pair.shape[1] // 2
    a, b = tl.split(tl.permute(tl.reshape(pair, (R, BN // 8, 2, 8)), (0, 1, 3, 2)))
    return tl.reshape(a, (R, BN)), tl.reshape(b, (R, BN))


@triton.jit
def together(a, b):
    """The opposite of `apart`."""
    R: tl.constexpr = a.shape[0]
    BN: tl.constexpr = a.shape[1]
    pair = tl.join(tl.reshape(a, (R, BN // 8, 8)), tl.reshape(b, (R, BN // 8, 8)))
    return tl.reshape(tl.permute(pair, (0, 1, 3, 2)), (R, 2 * BN))


@triton.jit
def half_normal(x_ptr, gamma_ptr, beta_ptr, tile, inside, c, eps, C: tl.constexpr):
    """LN(x) / 2 of a tile of rows in fp32, and mean and rstd of the rows."""
    x = tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32) * 0.5
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32) * 0.5
    mean, rstd = row_statistics(x, c, eps, C)
    return normalised(x, mean, rstd, c, C) * gamma[None, :] + beta[None, :], mean, rstd


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
    JOINT: tl.constexpr,
    ADDED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of BM rows: y = h·w_outᵀ, hidden chunk by hidden chunk. JOINT: a and b come from one product.

    ADDED: x + y.
    """
    FULL: tl.constexpr = C == BC and H % BN == 0
    dtype = w_ptr.dtype.element_ty
    wo_ptr = w_ptr + 2 * H * C
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    tile = m[:, None] * C + c[None, :]
    n, _, _ = half_normal(x_ptr, gamma_ptr, beta_ptr, tile, inside, c, eps, C)
    n = n.to(dtype)
    acc = tl.zeros([BM, BC], tl.float32)
    for start in tl.range(0, H, BN, num_stages=STAGES):
        if JOINT:
            w = load_pair(w_ptr, start, c, C, H, BN, FULL)
            wo = load_out(wo_ptr, start, c, C, H, BN, FULL)
            a, b = apart(tl.dot(n, tl.trans(w), input_precision="ieee"))
        else:
            wa = load_chunk(w_ptr, start, c, C, H, BN, FULL)
            wb = load_chunk(w_ptr + H * C, start, c, C, H, BN, FULL)
            wo = load_out(wo_ptr, start, c, C, H, BN, FULL)
            a = tl.dot(n, tl.trans(wa), input_precision="ieee")
            b = tl.dot(n, tl.trans(wb), input_precision="ieee")
        h = (swish_of_half(a, FAST) * b).to(dtype)
        acc = accumulate(acc, h, tl.trans(wo))
    y = acc * 2.0
    if ADDED:
        # Read again (from L2), and not before now: x would cost BM·BC registers.
        tl.debug_barrier()
        y += tl.load(x_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + tile, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def hidden_gradients(a, b, dh, FAST: tl.constexpr):
    """From halves of the pre-activations and dh: h / 2, da, db (fp32)."""
    if FAST:  # with T = g - 1 the slope is 1 + (T + swish · (1 - T)), one instruction less
        t = fast_tanh(a)
        swish = a * t + a
        db = dh * b
        da = db * (swish * (1.0 - t) + t) + db
    else:
        g = gate(a, False)
        swish = a * g
        da = dh * b * (g + swish * (2.0 - g))
    return swish * b, da, dh * swish


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
    more_ptr,
    rows,
    group,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    FAST: tl.constexpr,
    JOINT: tl.constexpr,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`group` consecutive tiles of BM rows: dx, n / 2 for the weight gradients, and the program's share of dγ and dβ.

    JOINT: a and b come from one product, and their gradients go into one. MORE: another gradient of x is added to dx.
    """
    FULL: tl.constexpr = C == BC and H % BN == 0
    dtype = w_ptr.dtype.element_ty
    wo_ptr = w_ptr + 2 * H * C
    c = tl.arange(0, BC)
    for step in range(group):
        m = (tl.program_id(0).to(tl.int64) * group + step) * BM + tl.arange(0, BM)
        inside = (m < rows)[:, None] & (c < C)[None, :]
        tile = m[:, None] * C + c[None, :]
        n, mean, rstd = half_normal(x_ptr, gamma_ptr, beta_ptr, tile, inside, c, eps, C)
        n = n.to(dtype)
        tl.store(n_ptr + tile, n, mask=inside)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(dtype)
        acc = tl.zeros([BM, BC], tl.float32)
        for start in tl.range(0, H, BN, num_stages=STAGES):
            if JOINT:
                w = load_pair(w_ptr, start, c, C, H, BN, FULL)
                wo = load_out(wo_ptr, start, c, C, H, BN, FULL)
                a, b = apart(tl.dot(n, tl.trans(w), input_precision="ieee"))
                dh = tl.dot(dy, wo, input_precision="ieee")
                _h, da, db = hidden_gradients(a, b, dh, FAST)
                acc = accumulate(acc, together(da, db).to(dtype), w)
            else:
                wa = load_chunk(w_ptr, start, c, C, H, BN, FULL)
                wb = load_chunk(w_ptr + H * C, start, c, C, H, BN, FULL)
                wo = load_out(wo_ptr, start, c, C, H, BN, FULL)
                a = tl.dot(n, tl.trans(wa), input_precision="ieee")
                b = tl.dot(n, tl.trans(wb), input_precision="ieee")
                dh = tl.dot(dy, wo, input_precision="ieee")
                _h, da, db = hidden_gradients(a, b, dh, FAST)
                acc = accumulate(acc, da.to(dtype), wa)
                acc = accumulate(acc, db.to(dtype), wb)
        share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        # The row tile is read again (from L2): keeping it would cost BM·BC registers through the loop.
        x = tl.load(x_ptr + tile, mask=inside, other=0.0)
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dn = as_memory_lies(acc, dx_ptr + tile, inside)
        normal = normalised(x.to(tl.float32), mean, rstd, c, C)
        finish_rows(dn, normal, rstd, gamma, dx_ptr, share_ptr, more_ptr, tile, inside, c, step > 0, C, MORE)


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
    TURNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of BN hidden units over every `splits`-th row tile: partial dw_a, dw_b `[H, C]`, dw_out `[C, H]`.

    `n_ptr` holds n / 2. TURNED: hidden units are the rows of every product, so that gradients go from one product to
    the next in registers. Three sums of BN·BC fp32 fill these, so what waits between products is kept in 16 bits, and
    every product is issued as late as its result is wanted: with all of a, b and dh at once the compiler would have
    no registers for products that run while it goes on.
    """
    dtype = w_ptr.dtype.element_ty
    wa_ptr = w_ptr
    wb_ptr = w_ptr + H * C
    wo_ptr = w_ptr + 2 * H * C
    split = tl.program_id(1)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    if TURNED:
        real = (j < H)[:, None] & (c < C)[None, :]
        wide = j[:, None] * C + c[None, :]
        tall = j[:, None] + c[None, :] * H
        dwa = tl.zeros([BN, BC], tl.float32)
        dwb = tl.zeros([BN, BC], tl.float32)
        dwo = tl.zeros([BN, BC], tl.float32)
    else:
        real = (c < C)[:, None] & (j < H)[None, :]
        wide = c[:, None] + j[None, :] * C
        tall = c[:, None] * H + j[None, :]
        dwa = tl.zeros([BC, BN], tl.float32)
        dwb = tl.zeros([BC, BN], tl.float32)
        dwo = tl.zeros([BC, BN], tl.float32)
    wa = tl.load(wa_ptr + wide, mask=real, other=0.0)
    wb = tl.load(wb_ptr + wide, mask=real, other=0.0)
    wo = tl.load(wo_ptr + tall, mask=real, other=0.0)
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        tile = m[:, None] * C + c[None, :]
        inside = (m < rows)[:, None] & (c < C)[None, :]
        n = tl.load(n_ptr + tile, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(dtype)
        if TURNED:
            b = tl.dot(wb, tl.trans(n), input_precision="ieee").to(dtype)
            a = tl.dot(wa, tl.trans(n), input_precision="ieee")
            g = gate(a, FAST)
            swish = a * g
            slope = (g + swish * (2.0 - g)).to(dtype)
            swish = swish.to(dtype)
            dwo = accumulate(dwo, multiply(b, swish, FAST), dy)
            slope = multiply(b, slope, FAST)
            dh = tl.dot(wo, tl.trans(dy), input_precision="ieee").to(dtype)
            dwb = accumulate(dwb, multiply(dh, swish, FAST), n)
            dwa = accumulate(dwa, multiply(dh, slope, FAST), n)
        else:
            a = tl.dot(n, wa, input_precision="ieee")
            b = tl.dot(n, wb, input_precision="ieee")
            dh = tl.dot(dy, wo, input_precision="ieee")
            h, da, db = hidden_gradients(a, b, dh, FAST)
            dwa = accumulate(dwa, tl.trans(n), da.to(dtype))
            dwb = accumulate(dwb, tl.trans(n), db.to(dtype))
            dwo = accumulate(dwo, tl.trans(dy), h.to(dtype))
    share = partial_ptr + split.to(tl.int64) * 3 * C * H
    tl.store(share + wide, dwa * 2.0, mask=real)
    tl.store(share + C * H + wide, dwb * 2.0, mask=real)
    tl.store(share + 2 * C * H + tall, dwo * 2.0, mask=real)
