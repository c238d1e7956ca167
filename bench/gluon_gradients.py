"""Attention's gradients in Gluon: see `hopper_attention_lab`, and for what is computed `optimized.ops.attention.backward`.

With their operands in registers they took 168 to 255 of them and lost to Triton's (`gluon.txt`). In shared memory keys and values take
128, so that four programs are on a multiprocessor where Triton has three, in 11.7 instructions a score instead of 12.4 as counted on
the card, or 10.1 and 167 registers with every place known while compiling; queries with planes 9.3 instead of 12, in 242. Compiled, not run.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from gluon_attention import load_raw, unpacked
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import barrier


@gluon.jit
def fetch_queries(q_ptr, g_ptr, beside_ptr, q_s, g_s, beside_s, slot, q0, H: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, layout, bl, on):  # fmt: skip
    """Queries and gradients of the output of one row, as one group."""
    cells = (q0 + gl.arange(0, BQ, gl.SliceLayout(1, layout)))[:, None] * (H * D)
    cells = cells + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(q_s.index(slot), q_ptr + cells, mask=on)
    async_copy.async_copy_global_to_shared(g_s.index(slot), g_ptr + cells, mask=on)
    b = (q0 + gl.arange(0, BQ, gl.SliceLayout(1, bl)))[:, None] * 16 + gl.arange(
        0, 16, gl.SliceLayout(0, bl)
    )[None, :]
    async_copy.async_copy_global_to_shared(beside_s.index(slot), beside_ptr + b, mask=on)
    async_copy.commit_group()


@gluon.jit
def columns_of_ones(first: gl.constexpr, layout: gl.constexpr):
    """`[64, 16]`: what picks the three parts of a number."""
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    picked = gl.where((e >= first) & (e < first + 3), 1.0, 0.0)
    return (picked[None, :] + gl.full([64, 16], 0.0, gl.float32, layout)).to(gl.bfloat16)


@gluon.jit
def transposed_scores(k, v, lses, deltas, q_s, g_s, beside_s, slot, none):
    """k·q + lse and v·g - delta, `[keys, queries]`."""
    beside = beside_s.index(slot).permute((1, 0))
    s = warpgroup_mma(k, q_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(lses, beside, s, is_async=True)
    dp = warpgroup_mma(v, g_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    return s, warpgroup_mma(deltas, beside, dp, is_async=True)


@gluon.jit(do_not_specialize=["rows"])
def grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, beside_ptr, dk_ptr, dv_ptr, rows, n, scale, unit,
    H: gl.constexpr, BQ: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TURN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `attention.backward.grad_kv_kernel`, 64 keys of one row of one head, no key masked, n a multiple of 128.

    Tensors as of `gluon_attention.attention_kernel`; bias_ptr is packed [k, q]; beside_ptr `[rows, H, n, 16]` in bf16: columns 0 to 2 the
    three parts of -lse / scale, 3 to 5 those of minus the sums over o ⊙ do, which products with ones add.
    """
    gl.assume(n > 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BQ, 16])
    d_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, d_l, 2)
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
    eb = beside_ptr + line.to(gl.int64) * 16
    blocks = (n + 127) // 128 * 8
    bias_at = (h * blocks + k0 // 16).to(gl.int64) * blocks * 128
    q_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BQ, D], tile)
    g_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BQ, D], tile)
    beside_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BQ, 16], thin)
    for s in gl.static_range(STAGES - 1):
        fetch_queries(qb, gb, eb, q_s, g_s, beside_s, s, s * BQ, H, BQ, D, kl, bl, s * BQ < n)
    cells = (k0 + gl.arange(0, 64, gl.SliceLayout(1, kl)))[:, None] * (H * D)
    cells = head + cells + gl.arange(0, D, gl.SliceLayout(0, kl))[None, :]
    k = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(k_ptr + cells))
    v = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(v_ptr + cells))
    lses = gl.allocate_shared_memory(gl.bfloat16, [64, 16], thin, columns_of_ones(0, bl))
    deltas = gl.allocate_shared_memory(gl.bfloat16, [64, 16], thin, columns_of_ones(3, bl))
    fence_async_shared()
    none = gl.full([64, BQ], 0.0, gl.float32, s_l)
    dk = gl.full([64, D], 0.0, gl.float32, d_l)
    dv = dk
    raw = load_raw(bias_ptr, bias_at, BQ, rl, blocks)
    async_copy.wait_group(STAGES - 2)
    barrier()
    s, dp = transposed_scores(k, v, lses, deltas, q_s, g_s, beside_s, 0, none)
    s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    turning = 0
    for q0 in range(0, n, TURN * BQ):
        for part in gl.static_range(TURN):
            now = q0 + part * BQ
            # With as many steps a turn as stages every place is known while compiling.
            slot = part if TURN == STAGES else turning
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            next_s, next_dp = transposed_scores(k, v, lses, deltas, q_s, g_s, beside_s, following, none)
            far = now + (STAGES - 1) * BQ
            fetch_queries(
                qb, gb, eb, q_s, g_s, beside_s, (slot + STAGES - 1) % STAGES, far, H, BQ, D, kl, bl, far < n
            )
            p = gl.exp2(s * unit + unpacked(raw, BQ, s_l))
            raw = load_raw(bias_ptr, bias_at + gl.minimum(now + BQ, n - BQ) * 8, BQ, rl, blocks)
            of_v = gl.convert_layout(p.to(gl.bfloat16), p_l)
            dv = warpgroup_mma(of_v, g_s.index(slot), dv, is_async=True)
            of_k = gl.convert_layout((p * dp).to(gl.bfloat16), p_l)
            dk = warpgroup_mma(of_k, q_s.index(slot), dk, is_async=True)
            deps = [next_s, next_dp, dk, dv, of_k, of_v]
            s, dp, dk, dv, of_k, of_v = warpgroup_mma_wait(0, deps=deps)
            turning = following
    async_copy.wait_group(0)
    r = (k0 + gl.arange(0, 64, gl.SliceLayout(1, d_l)))[:, None] * (H * D)
    cells = head + r + gl.arange(0, D, gl.SliceLayout(0, d_l))[None, :]
    gl.store(dk_ptr + cells, (dk * scale).to(gl.bfloat16))
    gl.store(dv_ptr + cells, dv.to(gl.bfloat16))


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
    return gl.allocate_shared_memory(gl.bfloat16, [64, 16], operand, made.to(gl.bfloat16))


@gluon.jit(do_not_specialize=["rows", "groups", "start"])
def grad_q_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, bias_ptr, beyond_ptr, lse_ptr, delta_ptr, dq_ptr, planes_ptr,
    rows, n, start, groups, scale, unit,
    H: gl.constexpr, ROWS: gl.constexpr, BK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `attention.backward.grad_q_kernel` with SUMS: 64 queries of three rows of one head, from row `start` on; `rows` is a
    multiple of three.

    bias_ptr packed [q, k]; lse_ptr and delta_ptr `[rows, H, n]` in fp32: -lse / scale, and the sums over o ⊙ do; beyond_ptr
    `[rows, n, 16]`: ones in columns 0 to 2, in column 3 -1e30 where the key is masked.
    """
    gl.static_assert(ROWS == 3)
    gl.assume(n > 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BK, 16])
    d_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, d_l, 2)
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
    q_0 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(q_ptr + cells))
    g_0 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(g_ptr + cells))
    cells += across
    q_1 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(q_ptr + cells))
    g_1 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(g_ptr + cells))
    cells += across
    q_2 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(q_ptr + cells))
    g_2 = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(g_ptr + cells))
    next_row = H * n
    l_0 = beside_row(lse_ptr + line, 1.0, True, bl, thin)
    l_1 = beside_row(lse_ptr + line + next_row, 1.0, True, bl, thin)
    l_2 = beside_row(lse_ptr + line + 2 * next_row, 1.0, True, bl, thin)
    m_0 = beside_row(delta_ptr + line, -1.0, False, bl, thin)
    m_1 = beside_row(delta_ptr + line + next_row, -1.0, False, bl, thin)
    m_2 = beside_row(delta_ptr + line + 2 * next_row, -1.0, False, bl, thin)
    fence_async_shared()
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
