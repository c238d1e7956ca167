"""Attention's forward pass in Gluon: see `hopper_attention_lab`, and for what is computed `optimized.ops.attention`.

Products do what else would be additions in every score: they mask keys, a number in bf16 beside ones, and sum the exponentials.

With queries in registers it took 134 or 168 of them, so that three programs of 4 warps fitted on a multiprocessor, and lost to Triton's
four (`gluon.txt`). Queries in shared memory leave it at 128, with 8 bytes spilled.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
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
    """q·k of one row, q in shared memory, far below everything where the key is masked: a product with a column of ones says so."""
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
    q_a = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(cells))
    q_b = gl.allocate_shared_memory(gl.bfloat16, [64, D], tile, gl.load(cells + across))
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
