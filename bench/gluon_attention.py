"""Attention in Gluon: see `gluon_pair`, and for what is computed `optimized.ops.attention`.

Products do what else would be additions in every score: they mask keys and add log-sum-exp and delta, numbers in bf16 beside
ones, and sum the exponentials.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from gluon_pair import barrier
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def load_raw(bias_ptr, at, BK: gl.constexpr, layout: gl.constexpr, blocks):
    """A packed bias tile of 64 queries as 32-bit pairs, 16 keys at a time: `packing.load_packed`."""
    x = gl.arange(0, 4, gl.SliceLayout(1, layout))
    w = gl.arange(0, 128, gl.SliceLayout(0, layout))
    first = bias_ptr + at + (x * (blocks * 128))[:, None] + w[None, :]
    if BK == 32:
        return gl.load(first), gl.load(first + 128)
    else:
        return gl.load(first), gl.load(first + 128), gl.load(first + 256), gl.load(first + 384)


@gluon.jit
def unpacked(raw, BK: gl.constexpr, layout: gl.constexpr):
    """The tile where the matrix unit leaves its scores, in log2 units: `packing.unpacked`."""
    if BK == 32:
        pairs = gl.permute(gl.reshape(gl.join(raw[0], raw[1]), (4, 128, 2)), (0, 2, 1))
    else:
        four = gl.join(gl.join(raw[0], raw[2]), gl.join(raw[1], raw[3]))
        pairs = gl.permute(gl.reshape(four, (4, 128, 4)), (0, 2, 1))
    even = (pairs << 16).to(gl.float32, bitcast=True)
    odd = (pairs & -65536).to(gl.float32, bitcast=True)
    x = gl.reshape(gl.join(even, odd), (4, BK // 16, 8, 4, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (0, 4, 2, 1, 5, 3, 6)), (64, BK))
    return gl.convert_layout(x, layout, assert_trivial=True) * 1.4426950408889634


@gluon.jit
def fetch_keys(
    k_ptr, v_ptr, beyond_ptr, k_s, v_s, beyond_s, slot, k0, n,
    H: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, kl, bl, on,
):  # fmt: skip
    """Keys and values of two rows, and what masks their keys, as one group."""
    k = k0 + gl.arange(0, BK, gl.SliceLayout(1, kl))
    d = gl.arange(0, D, gl.SliceLayout(0, kl))
    for i in gl.static_range(2):
        cells = i * n * (H * D) + k[:, None] * (H * D) + d[None, :]
        async_copy.async_copy_global_to_shared(k_s.index(slot * 2 + i), k_ptr + cells, mask=on)
        async_copy.async_copy_global_to_shared(v_s.index(slot * 2 + i), v_ptr + cells, mask=on)
        if MASKED:
            b = (i * n + k0 + gl.arange(0, BK, gl.SliceLayout(1, bl)))[:, None] * 16
            columns = gl.arange(0, 16, gl.SliceLayout(0, bl))
            async_copy.async_copy_global_to_shared(
                beyond_s.index(slot * 2 + i), beyond_ptr + b + columns[None, :], mask=on
            )
    async_copy.commit_group()


@gluon.jit
def scores(q, one_s, k_s, beyond_s, at, none, MASKED: gl.constexpr):
    """q·k of one row, far below everything where the key is masked: a product with a column of ones says so."""
    s = warpgroup_mma(q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
    if MASKED:
        s = warpgroup_mma(one_s, beyond_s.index(at).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def weights(s, bias, total, unit, BK: gl.constexpr, SUMS: gl.constexpr, layout: gl.constexpr):
    """exp of the scores as the operand of the next product; their sums, unless a product takes those."""
    p = gl.exp2(s * unit + bias)
    if not SUMS:
        total += gl.sum(gl.sum(gl.reshape(p, (64, BK // 8, 4, 2)), 3), 1)
    return gl.convert_layout(p.to(gl.bfloat16), layout), total


@gluon.jit(do_not_specialize=["rows"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, beyond_ptr, o_ptr, lse_ptr, rows, n, unit,
    H: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr, SUMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As the fast part of `attention.forward.forward_kernel`: 64 queries of two rows of one head.

    q, k, v and o `[rows, n, H, D]`, rows even, n a multiple of 64; beyond_ptr `[rows, n, 16]`: 0, or -1e30 in column 0
    of a masked key. SUMS: the sums of exponentials by products with ones.
    """
    gl.assume(n > 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BK, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    t_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 8, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, o_l, 2)
    q_l: gl.constexpr = gl.DotOperandLayout(0, s_l, 2)
    kl: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    rl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    tiles = n // 64
    pid = gl.program_id(0)
    q0 = (pid % tiles) * 64
    first = (pid // tiles) % (rows // 2) * 2
    h = pid // tiles // (rows // 2)
    across = n * (H * D)
    head = first.to(gl.int64) * across + h * D
    kb, vb, bb = k_ptr + head, v_ptr + head, beyond_ptr + first.to(gl.int64) * n * 16
    # Both axes of the packed bias are padded to 128.
    blocks = (n + 127) // 128 * 8
    bias_at = (h * blocks + q0 // 16).to(gl.int64) * blocks * 128
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, BK, D], tile)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, BK, D], tile)
    beyond_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, BK, 16], thin)
    for s in gl.static_range(STAGES - 1):
        fetch_keys(kb, vb, bb, k_s, v_s, beyond_s, s, s * BK, n, H, BK, D, MASKED, kl, bl, s * BK < n)
    where = q0 + gl.arange(0, 64, gl.SliceLayout(1, kl))
    cells = q_ptr + head + where[:, None] * (H * D) + gl.arange(0, D, gl.SliceLayout(0, kl))[None, :]
    q_a, q_b = gl.convert_layout(gl.load(cells), q_l), gl.convert_layout(gl.load(cells + across), q_l)
    column = gl.arange(0, 16, gl.SliceLayout(0, bl))
    one = gl.where(column == 0, 1.0, 0.0)[None, :] + gl.full([64, 16], 0.0, gl.float32, bl)
    one_s = gl.allocate_shared_memory(gl.bfloat16, [64, 16], thin, one.to(gl.bfloat16))
    ones_s = gl.allocate_shared_memory(gl.bfloat16, [8, BK], tile, gl.full([8, BK], 1.0, gl.bfloat16, kl))
    fence_async_shared()
    ones = ones_s.permute((1, 0))
    none = gl.full([64, BK], 0.0, gl.float32, s_l)
    acc_a = gl.full([64, D], 0.0, gl.float32, o_l)
    acc_b = acc_a
    if SUMS:
        total_a = gl.full([64, 8], 0.0, gl.float32, t_l)
    else:
        total_a = gl.sum(gl.sum(gl.reshape(none, (64, BK // 8, 4, 2)), 3), 1)
    total_b = total_a
    raw = load_raw(bias_ptr, bias_at, BK, rl, blocks)
    async_copy.wait_group(STAGES - 2)
    barrier()
    s_a = scores(q_a, one_s, k_s, beyond_s, 0, none, MASKED)
    s_b = scores(q_b, one_s, k_s, beyond_s, 1, none, MASKED)
    s_a, s_b = warpgroup_mma_wait(0, deps=[s_a, s_b])
    slot = 0
    for k0 in range(0, n, 2 * BK):
        for half in gl.static_range(2):
            now = k0 + half * BK
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            far = now + (STAGES - 1) * BK
            free = (slot + STAGES - 1) % STAGES
            fetch_keys(kb, vb, bb, k_s, v_s, beyond_s, free, far, n, H, BK, D, MASKED, kl, bl, far < n)
            bias = unpacked(raw, BK, s_l)
            next_a = scores(q_a, one_s, k_s, beyond_s, following * 2, none, MASKED)
            p_a, total_a = weights(s_a, bias, total_a, unit, BK, SUMS, p_l)
            acc_a = warpgroup_mma(p_a, v_s.index(slot * 2), acc_a, is_async=True)
            if SUMS:
                total_a = warpgroup_mma(p_a, ones, total_a, is_async=True)
            next_b = scores(q_b, one_s, k_s, beyond_s, following * 2 + 1, none, MASKED)
            p_b, total_b = weights(s_b, bias, total_b, unit, BK, SUMS, p_l)
            # Not before: its registers are those of the bias in use.
            raw = load_raw(bias_ptr, bias_at + gl.minimum(now + BK, n - BK) * 8, BK, rl, blocks)
            acc_b = warpgroup_mma(p_b, v_s.index(slot * 2 + 1), acc_b, is_async=True)
            if SUMS:
                total_b = warpgroup_mma(p_b, ones, total_b, is_async=True)
                s_a, acc_a, total_a, s_b, acc_b, total_b, p_a, p_b = warpgroup_mma_wait(
                    0, deps=[next_a, acc_a, total_a, next_b, acc_b, total_b, p_a, p_b]
                )
            else:
                s_a, acc_a, s_b, acc_b, p_a, p_b = warpgroup_mma_wait(
                    0, deps=[next_a, acc_a, next_b, acc_b, p_a, p_b]
                )
            slot = following
    async_copy.wait_group(0)
    for i in gl.static_range(2):
        acc = acc_a if i == 0 else acc_b
        total = total_a if i == 0 else total_b
        total = gl.max(total, 1) if SUMS else gl.sum(total, 1)
        total = gl.convert_layout(total, gl.SliceLayout(1, o_l))
        out = acc * (1.0 / total)[:, None]
        q = q0 + gl.arange(0, 64, gl.SliceLayout(1, o_l))
        d = gl.arange(0, D, gl.SliceLayout(0, o_l))
        gl.store(o_ptr + head + i * across + q[:, None] * (H * D) + d[None, :], out.to(gl.bfloat16))
        gl.store(lse_ptr + ((first + i) * H + h).to(gl.int64) * n + q, gl.log2(total) * 0.6931471805599453)


@gluon.jit
def fetch_queries(q_ptr, g_ptr, q_s, g_s, slot, q0, H: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, layout, on):  # fmt: skip
    """Queries and gradients of the output of one row, as one group."""
    cells = (q0 + gl.arange(0, BQ, gl.SliceLayout(1, layout)))[:, None] * (H * D)
    cells = cells + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(q_s.index(slot), q_ptr + cells, mask=on)
    async_copy.async_copy_global_to_shared(g_s.index(slot), g_ptr + cells, mask=on)
    async_copy.commit_group()


@gluon.jit
def in_three(x, e, first: gl.constexpr):
    """x in bf16 parts, 24 bits of it, in columns `first` to `first` + 2 of 16."""
    high = x.to(gl.bfloat16).to(gl.float32)
    middle = (x - high).to(gl.bfloat16).to(gl.float32)
    low = x - high - middle
    low_or_none = gl.where((e == first + 2)[None, :], low[:, None], 0.0)
    return gl.where(
        (e == first)[None, :],
        high[:, None],
        gl.where((e == first + 1)[None, :], middle[:, None], low_or_none),
    )


@gluon.jit
def columns_of_ones(first: gl.constexpr, layout: gl.constexpr):
    """`[64, 16]`: what picks the three parts of a number."""
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    picked = gl.where((e >= first) & (e < first + 3), 1.0, 0.0)
    return (picked[None, :] + gl.full([64, 16], 0.0, gl.float32, layout)).to(gl.bfloat16)


@gluon.jit
def transposed_scores(k, v, lses, deltas, q_s, g_s, beside_s, slot, at, none):
    """k·q + lse and v·g - delta, `[keys, queries]`."""
    beside = beside_s.index(at).permute((1, 0))
    s = warpgroup_mma(k, q_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(lses, beside, s, is_async=True)
    dp = warpgroup_mma(v, g_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    return s, warpgroup_mma(deltas, beside, dp, is_async=True)


@gluon.jit(do_not_specialize=["rows"])
def grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, rows, n, scale, unit,
    H: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `attention.backward.grad_kv_kernel`, 64 keys of one row of one head, no key masked.

    Tensors as of `attention_kernel`; bias_ptr is packed [k, q]; lse_ptr and delta_ptr `[rows, H, n]` in fp32: -lse / scale, and
    the sums over o ⊙ do. A product adds them to the scores: each is three numbers in bf16 beside ones.
    """
    gl.assume(n > 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BQ, 16])
    d_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, d_l, 2)
    k_l: gl.constexpr = gl.DotOperandLayout(0, s_l, 2)
    kl: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    rl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    tiles = n // 64
    pid = gl.program_id(0)
    k0 = (pid % tiles) * 64
    row = (pid // tiles) % rows
    h = pid // tiles // rows
    head = row.to(gl.int64) * n * (H * D) + h * D
    line = (row.to(gl.int64) * H + h) * n
    qb, gb = q_ptr + head, g_ptr + head
    blocks = (n + 127) // 128 * 8
    bias_at = (h * blocks + k0 // 16).to(gl.int64) * blocks * 128
    q_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BQ, D], tile)
    g_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BQ, D], tile)
    beside_s = gl.allocate_shared_memory(gl.bfloat16, [2, BQ, 16], thin)
    for s in gl.static_range(STAGES - 1):
        fetch_queries(qb, gb, q_s, g_s, s, s * BQ, H, BQ, D, kl, s * BQ < n)
    cells = (k0 + gl.arange(0, 64, gl.SliceLayout(1, kl)))[:, None] * (H * D)
    cells = head + cells + gl.arange(0, D, gl.SliceLayout(0, kl))[None, :]
    k = gl.convert_layout(gl.load(k_ptr + cells), k_l)
    v = gl.convert_layout(gl.load(v_ptr + cells), k_l)
    lses = gl.convert_layout(columns_of_ones(0, bl), k_l)
    deltas = gl.convert_layout(columns_of_ones(3, bl), k_l)
    e = gl.arange(0, 16, gl.SliceLayout(0, bl))
    at = line + gl.arange(0, BQ, gl.SliceLayout(1, bl))
    for s in gl.static_range(2):
        beside = in_three(gl.load(lse_ptr + at + s * BQ), e, 0) + in_three(-gl.load(delta_ptr + at + s * BQ), e, 3)  # fmt: skip
        beside_s.index(s).store(beside.to(gl.bfloat16))
    next_lse, next_delta = gl.load(lse_ptr + at + 2 * BQ), gl.load(delta_ptr + at + 2 * BQ)
    fence_async_shared()
    none = gl.full([64, BQ], 0.0, gl.float32, s_l)
    dk = gl.full([64, D], 0.0, gl.float32, d_l)
    dv = dk
    raw = load_raw(bias_ptr, bias_at, BQ, rl, blocks)
    async_copy.wait_group(STAGES - 2)
    barrier()
    s, dp = transposed_scores(k, v, lses, deltas, q_s, g_s, beside_s, 0, 0, none)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    slot = 0
    for q0 in range(0, n, 2 * BQ):
        for half in gl.static_range(2):
            now = q0 + half * BQ
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            next_s, next_dp = transposed_scores(
                k, v, lses, deltas, q_s, g_s, beside_s, following, 1 - half, none
            )
            far = now + (STAGES - 1) * BQ
            fetch_queries(qb, gb, q_s, g_s, (slot + STAGES - 1) % STAGES, far, H, BQ, D, kl, far < n)
            p = gl.exp2(s * unit + unpacked(raw, BQ, s_l))
            raw = load_raw(bias_ptr, bias_at + gl.minimum(now + BQ, n - BQ) * 8, BQ, rl, blocks)
            of_v = gl.convert_layout(p.to(gl.bfloat16), p_l)
            dv = warpgroup_mma(of_v, g_s.index(slot), dv, is_async=True)
            of_k = gl.convert_layout((p * dp).to(gl.bfloat16), p_l)
            dk = warpgroup_mma(of_k, q_s.index(slot), dk, is_async=True)
            # Of the step after the next, into the place of this one's, whose scores are there.
            beside_s.index(half).store((in_three(next_lse, e, 0) + in_three(-next_delta, e, 3)).to(gl.bfloat16))  # fmt: skip
            fence_async_shared()
            behind = at + gl.minimum(now + 3 * BQ, n - BQ)
            next_lse, next_delta = gl.load(lse_ptr + behind), gl.load(delta_ptr + behind)
            deps = [next_s, next_dp, dk, dv, of_k, of_v]
            s, dp, dk, dv, of_k, of_v = warpgroup_mma_wait(0, deps=deps)
            slot = following
    async_copy.wait_group(0)
    r = (k0 + gl.arange(0, 64, gl.SliceLayout(1, d_l)))[:, None] * (H * D)
    cells = head + r + gl.arange(0, D, gl.SliceLayout(0, d_l))[None, :]
    gl.store(dk_ptr + cells, (dk * scale).to(gl.bfloat16))
    gl.store(dv_ptr + cells, dv.to(gl.bfloat16))


@gluon.jit
def row_scores(q, g, lse, delta, k_s, v_s, beyond_s, at, none):
    """q·k + lse, far below everything where the key is masked, and g·v - delta: `[queries, keys]`."""
    beyond = beyond_s.index(at).permute((1, 0))
    s = warpgroup_mma(q, k_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(lse, beyond, s, is_async=True)
    dp = warpgroup_mma(g, v_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
    return s, warpgroup_mma(delta, beyond, dp, is_async=True)


@gluon.jit
def put_packed(total, planes_ptr, at, blocks, BK: gl.constexpr, layout: gl.constexpr):
    """A tile of 64 queries in packed order, 16 keys at a time: `packing.store_packed`."""
    x = gl.reshape(total.to(gl.bfloat16), (4, 2, 8, BK // 16, 2, 4, 2))
    x = gl.reshape(gl.permute(x, (0, 3, 2, 5, 1, 4, 6)), (4, BK // 16, 256))
    rows = gl.arange(0, 4, gl.SliceLayout(1, layout))
    cells = planes_ptr + at + (rows * (blocks * 256))[:, None] + gl.arange(0, 256, gl.SliceLayout(0, layout))[None, :]  # fmt: skip
    if BK == 32:
        first, second = gl.split(gl.permute(x, (0, 2, 1)))
        gl.store(cells, gl.convert_layout(first, layout, assert_trivial=True))
        gl.store(cells + 256, gl.convert_layout(second, layout, assert_trivial=True))
    else:
        even, odd = gl.split(gl.reshape(gl.permute(x, (0, 2, 1)), (4, 256, 2, 2)))
        first, third = gl.split(even)
        second, fourth = gl.split(odd)
        gl.store(cells, gl.convert_layout(first, layout, assert_trivial=True))
        gl.store(cells + 256, gl.convert_layout(second, layout, assert_trivial=True))
        gl.store(cells + 512, gl.convert_layout(third, layout, assert_trivial=True))
        gl.store(cells + 768, gl.convert_layout(fourth, layout, assert_trivial=True))


@gluon.jit
def fetch_rows_of_keys(
    k_ptr, v_ptr, beyond_ptr, k_s, v_s, beyond_s, slot, k0, n,
    H: gl.constexpr, ROWS: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, kl, bl, on,
):  # fmt: skip
    """Keys, values and what goes beside them, of ROWS rows, as one group."""
    k = k0 + gl.arange(0, BK, gl.SliceLayout(1, kl))
    d = gl.arange(0, D, gl.SliceLayout(0, kl))
    b = (k0 + gl.arange(0, BK, gl.SliceLayout(1, bl)))[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, bl))[None, :]  # fmt: skip
    for i in gl.static_range(ROWS):
        at = slot * ROWS + i
        cells = i * n * (H * D) + k[:, None] * (H * D) + d[None, :]
        async_copy.async_copy_global_to_shared(k_s.index(at), k_ptr + cells, mask=on)
        async_copy.async_copy_global_to_shared(v_s.index(at), v_ptr + cells, mask=on)
        async_copy.async_copy_global_to_shared(beyond_s.index(at), beyond_ptr + b + i * n * 16, mask=on)
    async_copy.commit_group()


@gluon.jit
def beside_row(ptr, sign, masks: gl.constexpr, layout: gl.constexpr, operand: gl.constexpr):
    """64 numbers in three parts, and a one in the column that masks keys: `[64, 16]`, an operand."""
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    x = gl.load(ptr + gl.arange(0, 64, gl.SliceLayout(1, layout))) * sign
    made = in_three(x, e, 0)
    if masks:
        made = gl.where((e == 3)[None, :], 1.0, made)
    return gl.convert_layout(made.to(gl.bfloat16), operand)


@gluon.jit(do_not_specialize=["rows", "groups", "start"])
def grad_q_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, beyond_ptr, lse_ptr, delta_ptr, dq_ptr, planes_ptr,
    rows, n, start, groups, scale, unit,
    H: gl.constexpr, ROWS: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `attention.backward.grad_q_kernel` with SUMS: 64 queries of three rows of one head, from row `start` on; `rows` is a
    multiple of three.

    Tensors as of `grad_kv_kernel`, bias_ptr packed [q, k]; beyond_ptr `[rows, n, 16]`: ones in columns 0 to 2, in column 3
    -1e30 where the key is masked. Scores of one row are computed beside the gradients of the one before.
    """
    gl.static_assert(ROWS == 3)
    gl.assume(n > 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BK, 16])
    d_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, d_l, 2)
    q_l: gl.constexpr = gl.DotOperandLayout(0, s_l, 2)
    kl: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    rl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    wl: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    tiles = n // 64
    pid = gl.program_id(0)
    q0 = (pid % tiles) * 64
    group = (pid // tiles) % groups
    first = start + group * ROWS
    h = pid // tiles // groups
    across = n * (H * D)
    head = first.to(gl.int64) * across + h * D
    line = (first.to(gl.int64) * H + h) * n + q0
    kb, vb, bb = k_ptr + head, v_ptr + head, beyond_ptr + first.to(gl.int64) * n * 16
    blocks = (n + 127) // 128 * 8
    bias_at = (h * blocks + q0 // 16).to(gl.int64) * blocks * 128
    plane_at = ((group * H + h) * blocks + q0 // 16).to(gl.int64) * blocks * 256
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * ROWS, BK, D], tile)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * ROWS, BK, D], tile)
    beyond_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * ROWS, BK, 16], thin)
    for s in gl.static_range(STAGES - 1):
        fetch_rows_of_keys(kb, vb, bb, k_s, v_s, beyond_s, s, s * BK, n, H, ROWS, BK, D, kl, bl, s * BK < n)
    cells = (q0 + gl.arange(0, 64, gl.SliceLayout(1, kl)))[:, None] * (H * D)
    cells = head + cells + gl.arange(0, D, gl.SliceLayout(0, kl))[None, :]
    q_0, g_0 = gl.convert_layout(gl.load(q_ptr + cells), q_l), gl.convert_layout(gl.load(g_ptr + cells), q_l)
    cells += across
    q_1, g_1 = gl.convert_layout(gl.load(q_ptr + cells), q_l), gl.convert_layout(gl.load(g_ptr + cells), q_l)
    cells += across
    q_2, g_2 = gl.convert_layout(gl.load(q_ptr + cells), q_l), gl.convert_layout(gl.load(g_ptr + cells), q_l)
    next_row = H * n
    l_0 = beside_row(lse_ptr + line, 1.0, True, bl, q_l)
    l_1 = beside_row(lse_ptr + line + next_row, 1.0, True, bl, q_l)
    l_2 = beside_row(lse_ptr + line + 2 * next_row, 1.0, True, bl, q_l)
    m_0 = beside_row(delta_ptr + line, -1.0, False, bl, q_l)
    m_1 = beside_row(delta_ptr + line + next_row, -1.0, False, bl, q_l)
    m_2 = beside_row(delta_ptr + line + 2 * next_row, -1.0, False, bl, q_l)
    none = gl.full([64, BK], 0.0, gl.float32, s_l)
    dq_0 = gl.full([64, D], 0.0, gl.float32, d_l)
    dq_1 = dq_0
    dq_2 = dq_0
    raw = load_raw(bias_ptr, bias_at, BK, rl, blocks)
    async_copy.wait_group(STAGES - 2)
    barrier()
    s, dp = row_scores(q_0, g_0, l_0, m_0, k_s, v_s, beyond_s, 0, none)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    slot = 0
    for k0 in range(0, n, 2 * BK):
        for half in gl.static_range(2):
            now = k0 + half * BK
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            far = now + (STAGES - 1) * BK
            free = (slot + STAGES - 1) % STAGES
            fetch_rows_of_keys(kb, vb, bb, k_s, v_s, beyond_s, free, far, n, H, ROWS, BK, D, kl, bl, far < n)
            bias = unpacked(raw, BK, s_l)
            next_s, next_dp = row_scores(q_1, g_1, l_1, m_1, k_s, v_s, beyond_s, slot * ROWS + 1, none)
            ds = gl.exp2(s * unit + bias) * dp
            total = ds
            of_q = gl.convert_layout(ds.to(gl.bfloat16), p_l)
            dq_0 = warpgroup_mma(of_q, k_s.index(slot * ROWS), dq_0, is_async=True)
            s, dp, dq_0, of_q = warpgroup_mma_wait(0, deps=[next_s, next_dp, dq_0, of_q])
            next_s, next_dp = row_scores(q_2, g_2, l_2, m_2, k_s, v_s, beyond_s, slot * ROWS + 2, none)
            ds = gl.exp2(s * unit + bias) * dp
            total += ds
            of_q = gl.convert_layout(ds.to(gl.bfloat16), p_l)
            dq_1 = warpgroup_mma(of_q, k_s.index(slot * ROWS + 1), dq_1, is_async=True)
            s, dp, dq_1, of_q = warpgroup_mma_wait(0, deps=[next_s, next_dp, dq_1, of_q])
            next_s, next_dp = row_scores(q_0, g_0, l_0, m_0, k_s, v_s, beyond_s, following * ROWS, none)
            ds = gl.exp2(s * unit + bias) * dp
            total += ds
            raw = load_raw(bias_ptr, bias_at + gl.minimum(now + BK, n - BK) * 8, BK, rl, blocks)
            of_q = gl.convert_layout(ds.to(gl.bfloat16), p_l)
            dq_2 = warpgroup_mma(of_q, k_s.index(slot * ROWS + 2), dq_2, is_async=True)
            put_packed(total, planes_ptr, plane_at + now * 16, blocks, BK, wl)
            s, dp, dq_2, of_q = warpgroup_mma_wait(0, deps=[next_s, next_dp, dq_2, of_q])
            slot = following
    async_copy.wait_group(0)
    r = (q0 + gl.arange(0, 64, gl.SliceLayout(1, d_l)))[:, None] * (H * D)
    cells = head + r + gl.arange(0, D, gl.SliceLayout(0, d_l))[None, :]
    gl.store(dq_ptr + cells, (dq_0 * scale).to(gl.bfloat16))
    gl.store(dq_ptr + cells + across, (dq_1 * scale).to(gl.bfloat16))
    gl.store(dq_ptr + cells + 2 * across, (dq_2 * scale).to(gl.bfloat16))
