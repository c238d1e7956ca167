"""Attention's forward pass in Gluon for any length and stride, the fast part of `optimized.ops.attention.forward`: see `hopper_attention_lab`.

Two rows a program, 64 queries. The scores of the next step, products that run on, are computed beside the exponentials of this one; Triton
can have those of one row early. Exponentials are summed by products with ones, or, where keys are masked, with one or zero for each
key; values of masked keys are zero, since their copies are left out. Queries stay in shared memory, so that four
programs of 128 registers are on a multiprocessor. Compiled: 6.9 instructions a score, 8.3 with a mask; at most 16 bytes spilled. Not run yet.

Where the sum of a query leaves the safe window its log-sum-exp is NaN, for another kernel to compute with a running maximum. Head size 32.
"""

# ruff: noqa: ANN001, ANN201, E741 (Gluon compiles these functions: an annotation would mean a compile-time constant)
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
from optimized.ops.names import profiled_as

QUERIES = gl.constexpr(64)
KEYS = gl.constexpr(32)
"""Of a step; a turn has two."""
TILE = gl.constexpr(128)
"""To which both axes of the packed bias are padded."""
LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def load_raw(pairs, layout: gl.constexpr, blocks):
    """A packed bias tile of 64 queries by 32 keys as 32-bit pairs: `packing.load_packed`."""
    x = gl.arange(0, 4, gl.SliceLayout(1, layout))
    first = pairs + (x * (blocks * 128))[:, None] + gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    return gl.load(first), gl.load(first + 128)


@gluon.jit
def unpacked(raw, layout: gl.constexpr):
    """The tile where the matrix unit leaves its scores, in log2 units: `packing.unpacked`."""
    pairs = gl.permute(gl.reshape(gl.join(raw[0], raw[1]), (4, 128, 2)), (0, 2, 1))
    even = (pairs << 16).to(gl.float32, bitcast=True)
    odd = (pairs & -65536).to(gl.float32, bitcast=True)
    x = gl.reshape(gl.join(even, odd), (4, KEYS // 16, 8, 4, 2, 2, 2))
    x = gl.reshape(gl.permute(x, (0, 4, 2, 1, 5, 3, 6)), (QUERIES, KEYS))
    return gl.convert_layout(x, layout, assert_trivial=True) * LOG2E


@gluon.jit
def load_keep(mask_ptr, at, k0, LK, MASKED: gl.constexpr, layout: gl.constexpr):
    """Which keys of a step are there, and which of them the mask keeps."""
    key = k0 + gl.arange(0, KEYS, layout)
    inside = key < LK
    if MASKED:
        return inside, gl.load(mask_ptr + at + key, mask=inside, other=0).to(gl.int1)
    else:
        return inside, inside


@gluon.jit
def fetch_row(k_ptr, v_ptr, keep, k_s, v_s, ones_s, k0, k_l, v_l, D: gl.constexpr, MASKED: gl.constexpr, kl: gl.constexpr, ml: gl.constexpr):  # fmt: skip
    """Keys and values of a row, those of masked keys zero, and one for each key that is kept."""
    n = gl.arange(0, KEYS, gl.SliceLayout(1, kl))
    d = gl.arange(0, D, gl.SliceLayout(0, kl))
    k_ptr += (k0.to(gl.int64) * k_l) * 8
    v_ptr += (k0.to(gl.int64) * v_l) * 8
    async_copy.async_copy_global_to_shared(
        k_s, k_ptr + (n * (k_l * 8))[:, None] + d[None, :], mask=keep[0][:, None]
    )
    async_copy.async_copy_global_to_shared(
        v_s, v_ptr + (n * (v_l * 8))[:, None] + d[None, :], mask=keep[1][:, None]
    )
    if MASKED:
        one = gl.convert_layout(gl.where(keep[1], 1.0, 0.0), gl.SliceLayout(0, ml), assert_trivial=True)
        ones_s.store((one[None, :] + gl.full([8, KEYS], 0.0, gl.float32, ml)).to(gl.bfloat16))


@gluon.jit
def scores(q_s, k_s, none):
    """q·k of one row, asked for."""
    return warpgroup_mma(q_s, k_s.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit(repr=profiled_as("attention_forward_hopper"), do_not_specialize=[
    "R", "H", "LQ", "LK", "q_b", "q_r", "q_h", "q_l", "k_b", "k_r", "k_h", "k_l", "v_b", "v_r", "v_h", "v_l", "o_b", "o_r", "o_h", "o_l", "mask_b", "mask_r",
])  # fmt: skip
def forward_kernel(
    Q, K, V, BIAS, MASK, O, LSE, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, o_b, o_r, o_h, o_l, mask_b, mask_r, unit,
    MASKED: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `forward.forward_kernel`; BIAS in 32-bit pairs, MASK `[B, R, LK]` in bytes, whose strides are counted in them."""
    gl.assume(R > 0)
    gl.assume(H > 0)
    gl.assume(LQ > 0)
    gl.assume(LK > 0)
    gl.assume(q_l >= 0)
    gl.assume(k_l >= 0)
    gl.assume(v_l >= 0)
    gl.assume(o_l >= 0)
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    t_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 8, 16])
    p_l: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    kl: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [num_warps, 1], [1, 0])
    ml: gl.constexpr = gl.BlockedLayout([2, 1], [4, 8], [1, num_warps], [0, 1])
    rl: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    tile: gl.constexpr = gl.NVMMASharedLayout(2 * D, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * KEYS, 16, 2)
    of_keys: gl.constexpr = gl.SliceLayout(1, kl)
    pid = gl.program_id(0)
    tiles = (LQ + QUERIES - 1) // QUERIES
    groups = (R + 1) // 2
    q0 = (pid % tiles) * QUERIES
    row_a = (pid // tiles) % groups * 2
    row_b = gl.minimum(row_a + 1, R - 1)
    h = (pid // tiles // groups) % H
    b = (pid // tiles // groups // H).to(gl.int64)
    k_blocks = (LK + TILE - 1) // TILE * (TILE // 16)
    q_blocks = (LQ + TILE - 1) // TILE * (TILE // 16)
    pairs = BIAS + ((b * H + h) * q_blocks + q0 // 16) * k_blocks * 128
    k_a, k_b_ = (
        K + (b * k_b + row_a * k_r.to(gl.int64) + h * k_h.to(gl.int64)) * 8,
        K + (b * k_b + row_b * k_r.to(gl.int64) + h * k_h.to(gl.int64)) * 8,
    )
    v_a, v_b_ = (
        V + (b * v_b + row_a * v_r.to(gl.int64) + h * v_h.to(gl.int64)) * 8,
        V + (b * v_b + row_b * v_r.to(gl.int64) + h * v_h.to(gl.int64)) * 8,
    )
    mask_a, mask_b_ = b * mask_b + row_a * mask_r.to(gl.int64), b * mask_b + row_b * mask_r.to(gl.int64)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, KEYS, D], tile)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, KEYS, D], tile)
    ones_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2 if MASKED else 1, 8, KEYS], narrow)
    if not MASKED:
        ones_s.index(0).store(gl.full([8, KEYS], 1.0, gl.bfloat16, ml))
    for s in gl.static_range(STAGES - 1):
        k0 = gl.to_tensor(s * KEYS)
        keep = load_keep(MASK, mask_a, k0, LK, MASKED, of_keys)
        fetch_row(
            k_a,
            v_a,
            keep,
            k_s.index(s * 2),
            v_s.index(s * 2),
            ones_s.index(s * 2 if MASKED else 0),
            k0,
            k_l,
            v_l,
            D,
            MASKED,
            kl,
            ml,
        )
        keep = load_keep(MASK, mask_b_, k0, LK, MASKED, of_keys)
        fetch_row(
            k_b_,
            v_b_,
            keep,
            k_s.index(s * 2 + 1),
            v_s.index(s * 2 + 1),
            ones_s.index(s * 2 + 1 if MASKED else 0),
            k0,
            k_l,
            v_l,
            D,
            MASKED,
            kl,
            ml,
        )
        async_copy.commit_group()
    qi = q0 + gl.arange(0, QUERIES, gl.SliceLayout(1, kl))
    cells = (gl.arange(0, QUERIES, gl.SliceLayout(1, kl)) * (q_l * 8))[:, None] + gl.arange(
        0, D, gl.SliceLayout(0, kl)
    )[None, :]
    q_at = Q + (b * q_b + h * q_h.to(gl.int64) + q0.to(gl.int64) * q_l) * 8
    there = (qi < LQ)[:, None]
    q_a = gl.allocate_shared_memory(
        gl.bfloat16,
        [QUERIES, D],
        tile,
        gl.load(q_at + row_a * q_r.to(gl.int64) * 8 + cells, mask=there, other=0.0),
    )
    q_b_ = gl.allocate_shared_memory(
        gl.bfloat16,
        [QUERIES, D],
        tile,
        gl.load(q_at + row_b * q_r.to(gl.int64) * 8 + cells, mask=there, other=0.0),
    )
    fence_async_shared()
    none = gl.full([QUERIES, KEYS], 0.0, gl.float32, s_l)
    acc_a = gl.full([QUERIES, D], 0.0, gl.float32, o_layout)
    acc_b = acc_a
    total_a = gl.full([QUERIES, 8], 0.0, gl.float32, t_l)
    total_b = total_a
    keys = k_blocks * 16
    raw = load_raw(pairs, rl, k_blocks)
    keep_a = load_keep(MASK, mask_a, gl.to_tensor((STAGES - 1) * KEYS), LK, MASKED, of_keys)
    keep_b = load_keep(MASK, mask_b_, gl.to_tensor((STAGES - 1) * KEYS), LK, MASKED, of_keys)
    async_copy.wait_group(STAGES - 2)
    barrier()
    s_a = scores(q_a, k_s.index(0), none)
    s_b = scores(q_b_, k_s.index(1), none)
    s_a, s_b = warpgroup_mma_wait(0, deps=[s_a, s_b])
    slot = 0
    # Two steps a turn, so that the scores of two take turns in two sets of registers and none are copied.
    for k0 in range(0, keys, 2 * KEYS):
        for half in gl.static_range(2):
            now = k0 + half * KEYS
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            if MASKED:
                fence_async_shared()
            barrier()
            far = now + (STAGES - 1) * KEYS
            free = (slot + STAGES - 1) % STAGES
            fetch_row(
                k_a,
                v_a,
                keep_a,
                k_s.index(free * 2),
                v_s.index(free * 2),
                ones_s.index(free * 2 if MASKED else 0),
                far,
                k_l,
                v_l,
                D,
                MASKED,
                kl,
                ml,
            )
            fetch_row(
                k_b_,
                v_b_,
                keep_b,
                k_s.index(free * 2 + 1),
                v_s.index(free * 2 + 1),
                ones_s.index(free * 2 + 1 if MASKED else 0),
                far,
                k_l,
                v_l,
                D,
                MASKED,
                kl,
                ml,
            )
            async_copy.commit_group()
            keep_a = load_keep(MASK, mask_a, far + KEYS, LK, MASKED, of_keys)
            keep_b = load_keep(MASK, mask_b_, far + KEYS, LK, MASKED, of_keys)
            bias = unpacked(raw, s_l)
            next_a = scores(q_a, k_s.index(following * 2), none)
            p_a = gl.convert_layout(gl.exp2(s_a * unit + bias).to(gl.bfloat16), p_l)
            acc_a = warpgroup_mma(p_a, v_s.index(slot * 2), acc_a, is_async=True)
            total_a = warpgroup_mma(
                p_a, ones_s.index(slot * 2 if MASKED else 0).permute((1, 0)), total_a, is_async=True
            )
            next_b = scores(q_b_, k_s.index(following * 2 + 1), none)
            p_b = gl.convert_layout(gl.exp2(s_b * unit + bias).to(gl.bfloat16), p_l)
            # Not before: its registers are those of the bias in use.
            raw = load_raw(pairs + gl.minimum(now + KEYS, keys - KEYS) * 8, rl, k_blocks)
            acc_b = warpgroup_mma(p_b, v_s.index(slot * 2 + 1), acc_b, is_async=True)
            total_b = warpgroup_mma(
                p_b, ones_s.index(slot * 2 + 1 if MASKED else 0).permute((1, 0)), total_b, is_async=True
            )
            deps = [next_a, acc_a, total_a, next_b, acc_b, total_b, p_a, p_b]
            s_a, acc_a, total_a, s_b, acc_b, total_b, p_a, p_b = warpgroup_mma_wait(0, deps=deps)
            slot = following
    async_copy.wait_group(0)
    for i in gl.static_range(2):
        acc = acc_a if i == 0 else acc_b
        # Eight equal columns: an exact mean, which keeps what is not a number.
        total = gl.sum(total_a if i == 0 else total_b, 1) * 0.125
        total = gl.convert_layout(total, gl.SliceLayout(1, o_layout))
        sound = (total > 2.0**-80) & (total < 2.0**80) & (gl.abs(gl.sum(acc, 1)) < float("inf"))
        out = acc * (1.0 / total)[:, None]
        if O.dtype.element_ty == gl.float16:
            out = gl.minimum(gl.maximum(out, -65504.0), 65504.0)
        row = row_a + i
        q = gl.arange(0, QUERIES, gl.SliceLayout(1, o_layout))
        d = gl.arange(0, D, gl.SliceLayout(0, o_layout))
        o_at = O + (b * o_b + row * o_r.to(gl.int64) + h * o_h.to(gl.int64) + q0.to(gl.int64) * o_l) * 8
        real = (q0 + q < LQ) & (row < R)
        gl.store(o_at + (q * (o_l * 8))[:, None] + d[None, :], out.to(O.dtype.element_ty), mask=real[:, None])
        lse = gl.where(sound, gl.log2(total) * LN2, float("nan"))
        gl.store(LSE + ((b * R + row) * H + h) * LQ + q0 + q, lse, mask=real)
