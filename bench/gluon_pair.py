"""Triangle multiplication and transition in Gluon, Triton's lower level, which says itself when a product is waited for:
see `gluon_lab`.

In all of them the product of the next tile, or of the next chunk of hidden units, is asked for before the end of this one
is computed, and waited for after it. Two steps a turn, so that the sums of two take turns in two sets of registers: one that
is copied makes the compiler's assembler run the matrix instructions one after another. Operands in registers go through the wait
too, so that nothing else takes their place before. Whole tiles only, bf16.
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

# Its name in Triton 3.6, and since.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def fast_tanh(x):
    """tanh(x) by the card's instruction."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def fetch_rows(z_ptr, into, step, WIDTH: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr, on):
    """Tile `step` of BM rows, on their way."""
    rows = step * BM + gl.arange(0, BM, gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    cells = z_ptr + rows.to(gl.int64)[:, None] * WIDTH + columns[None, :]
    async_copy.async_copy_global_to_shared(into, cells, mask=on)


@gluon.jit
def fetch_planes(ptr, into, plane, step, area, BM: gl.constexpr, layout: gl.constexpr, on):
    """Tile `step` of BM positions of the planes `plane`, on their way."""
    k = gl.arange(0, BM, gl.SliceLayout(0, layout))
    cells = ptr + plane.to(gl.int64)[:, None] * area + (step * BM + k)[None, :]
    async_copy.async_copy_global_to_shared(into, cells, mask=on)


@gluon.jit
def moment_of(e):
    """As `folded.moment_of`."""
    return gl.where(e == 1, 1, gl.where((e == 3) | (e == 5), 2, gl.where(e == 4, 3, 0)))


@gluon.jit
def fetch_in(z_ptr, moments_ptr, z_s, m_s, step, slot, area, BM: gl.constexpr, WIDTH: gl.constexpr, zl, ml, on):  # fmt: skip
    """What a tile of the input projections reads, as one group."""
    fetch_rows(z_ptr, z_s.index(slot), step, WIDTH, BM, zl, on)
    plane = moment_of(gl.arange(0, 16, gl.SliceLayout(1, ml)))
    fetch_planes(moments_ptr, m_s.index(slot), plane, step, area, BM, ml, on)
    async_copy.commit_group()


@gluon.jit
def products_in(z_s, m_s, w_b, beside_b, slot, none):
    """Linear part and gate of a tile; one wait does for both products."""
    both = warpgroup_mma(z_s.index(slot), w_b, none, use_acc=False, is_async=True)
    return warpgroup_mma(m_s.index(slot).permute((1, 0)), beside_b, both, is_async=True)


@gluon.jit
def put_gated(both, rstd, out_ptr, start, column, area, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """linear · σ(gate), channel by channel."""
    linear, gate = gl.split(gl.permute(gl.reshape(both, (BM, 2, BN)), (0, 2, 1)))
    scale = gl.convert_layout(rstd, gl.SliceLayout(1, linear.type.layout))[:, None]
    linear = linear * scale
    value = (linear * fast_tanh(gate * scale) + linear).to(gl.bfloat16)
    value = gl.convert_layout(gl.permute(value, (1, 0)), layout)
    t = column * BN + gl.arange(0, BN, gl.SliceLayout(1, layout))
    k = gl.arange(0, BM, gl.SliceLayout(0, layout))
    gl.store(out_ptr + t.to(gl.int64)[:, None] * area + (start + k)[None, :], value)


@gluon.jit(do_not_specialize=["group"])
def project_kernel(
    z_ptr, rstd_ptr, moments_ptr, folded_ptr, beside_ptr, out_ptr, padded, group,
    WIDTH: gl.constexpr, H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `folded.project_kernel`; beside_ptr `[4h, 16]` in bf16. z is contiguous, N its padded length and a multiple of BM."""
    gl.assume(padded > 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    ml: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * BN, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    area = padded.to(gl.int64) * padded
    column = gl.program_id(1)
    # Rows of the linear part, then as many of the gate.
    t = gl.arange(0, 2 * BN, gl.SliceLayout(1, zl))
    row = column * BN + t % BN + t // BN * (2 * H)
    cells = row[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, zl))[None, :]
    w_s = gl.allocate_shared_memory(gl.bfloat16, [2 * BN, WIDTH], wide, gl.load(folded_ptr + cells))
    t = gl.arange(0, 2 * BN, gl.SliceLayout(1, bl))
    row = column * BN + t % BN + t // BN * (2 * H)
    cells = row[:, None] * 16 + gl.arange(0, 16, gl.SliceLayout(0, bl))[None, :]
    beside_s = gl.allocate_shared_memory(gl.bfloat16, [2 * BN, 16], thin, gl.load(beside_ptr + cells))
    fence_async_shared()
    w_b, beside_b = w_s.permute((1, 0)), beside_s.permute((1, 0))
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, WIDTH], wide)
    m_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, BM], wide)
    none = gl.full([BM, 2 * BN], 0.0, gl.float32, acc_l)
    k = gl.arange(0, BM, gl.SliceLayout(1, acc_l))
    tiles = (padded * padded) // BM
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, tiles)
    for s in gl.static_range(STAGES - 1):
        fetch_in(z_ptr, moments_ptr, z_s, m_s, first + s, s, area, BM, WIDTH, zl, ml, first + s < last)
    async_copy.wait_group(STAGES - 2)
    barrier()
    rstd = gl.load(rstd_ptr + first * BM + k)
    both = warpgroup_mma_wait(0, deps=[products_in(z_s, m_s, w_b, beside_b, 0, none)])
    slot = 0
    # Two tiles a turn, so that their sums take turns in two sets of registers and none is copied.
    for step in range(first, last, 2):
        for half in gl.static_range(2):
            now = step + half
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            next_rstd = gl.load(rstd_ptr + gl.minimum(now + 1, tiles - 1) * BM + k)
            ahead = products_in(z_s, m_s, w_b, beside_b, following, none)
            far = now + STAGES - 1
            free = (slot + STAGES - 1) % STAGES
            fetch_in(z_ptr, moments_ptr, z_s, m_s, far, free, area, BM, WIDTH, zl, ml, far < last)
            if now < last:
                put_gated(both, rstd, out_ptr, now * BM, column, area, BM, BN, ml)
            both = warpgroup_mma_wait(0, deps=[ahead])
            rstd = next_rstd
            slot = following
    async_copy.wait_group(0)


@gluon.jit
def fetch_out(
    x_ptr, z_ptr, stats_ptr, moments_ptr, x_s, z_s, m_s, rx_s, rz_s, step, slot, area,
    WIDTH: gl.constexpr, H: gl.constexpr, BM: gl.constexpr, zl, xl, rl, on,
):  # fmt: skip
    """What a tile of the output side reads, as one group."""
    fetch_planes(x_ptr, x_s.index(slot), gl.arange(0, H, gl.SliceLayout(1, xl)), step, area, BM, xl, on)
    fetch_rows(z_ptr, z_s.index(slot), step, WIDTH, BM, zl, on)
    e = gl.arange(0, 16, gl.SliceLayout(1, xl))
    plane = gl.where(e < 6, 4 + moment_of(e), gl.where(e < 12, moment_of(e - 6), 0))
    fetch_planes(moments_ptr, m_s.index(slot), plane, step, area, BM, xl, on)
    p = stats_ptr + step * BM + gl.arange(0, BM, rl)
    async_copy.async_copy_global_to_shared(rx_s.index(slot), p, mask=on)
    async_copy.async_copy_global_to_shared(rz_s.index(slot), p + 2 * area, mask=on)
    async_copy.commit_group()


@gluon.jit
def products_out(wo_s, wg_s, bo_s, bg_s, x_s, z_s, m_s, slot, none):
    """Gate and linear part of a tile, channels as rows; one wait does for all four products."""
    gate = warpgroup_mma(wg_s, z_s.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
    gate = warpgroup_mma(bg_s, m_s.index(slot), gate, is_async=True)
    linear = warpgroup_mma(wo_s, x_s.index(slot), none, use_acc=False, is_async=True)
    return gate, warpgroup_mma(bo_s, m_s.index(slot), linear, is_async=True)


@gluon.jit(do_not_specialize=["group"])
def output_kernel(
    x_ptr, z_ptr, stats_ptr, moments_ptr, folded_ptr, beside_ptr, out_ptr, padded, group,
    WIDTH: gl.constexpr, H: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `folded_output.forward_kernel`; folded_ptr: out, then g; beside_ptr `[2, c, 16]` in bf16. N as for `project_kernel`."""
    gl.assume(padded > 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    rl: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BM, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    t = gl.arange(0, WIDTH, gl.SliceLayout(1, zl))[:, None]
    c = gl.arange(0, H, gl.SliceLayout(0, zl))[None, :]
    wo_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, H], wide, gl.load(folded_ptr + t * H + c))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, zl))[None, :]
    wg_s = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, WIDTH], wide, gl.load(folded_ptr + WIDTH * H + t * WIDTH + c)
    )
    t = gl.arange(0, WIDTH, gl.SliceLayout(1, bl))[:, None]
    cells = beside_ptr + t * 16 + gl.arange(0, 16, gl.SliceLayout(0, bl))[None, :]
    bo_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, 16], thin, gl.load(cells))
    bg_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, 16], thin, gl.load(cells + WIDTH * 16))
    fence_async_shared()
    x_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, H, BM], wide)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BM, WIDTH], wide)
    m_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16, BM], wide)
    rx_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    rz_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    none = gl.full([WIDTH, BM], 0.0, gl.float32, acc_l)
    along: gl.constexpr = gl.SliceLayout(0, acc_l)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // BM)
    for s in gl.static_range(STAGES - 1):
        fetch_out(
            x_ptr, z_ptr, stats_ptr, moments_ptr, x_s, z_s, m_s, rx_s, rz_s, first + s, s, area,
            WIDTH, H, BM, zl, xl, rl, first + s < last,
        )  # fmt: skip
    async_copy.wait_group(STAGES - 2)
    barrier()
    gate, linear = products_out(wo_s, wg_s, bo_s, bg_s, x_s, z_s, m_s, 0, none)
    gate, linear = warpgroup_mma_wait(0, deps=[gate, linear])
    rx, rz = rx_s.index(0).load(along), rz_s.index(0).load(along)
    slot = 0
    for step in range(first, last, 2):
        for half in gl.static_range(2):
            now = step + half
            following = (slot + 1) % STAGES
            async_copy.wait_group(STAGES - 3)
            barrier()
            next_gate, next_linear = products_out(wo_s, wg_s, bo_s, bg_s, x_s, z_s, m_s, following, none)
            far = now + STAGES - 1
            fetch_out(
                x_ptr, z_ptr, stats_ptr, moments_ptr, x_s, z_s, m_s, rx_s, rz_s, far, (slot + STAGES - 1) % STAGES, area,
                WIDTH, H, BM, zl, xl, rl, far < last,
            )  # fmt: skip
            linear = linear * (0.5 * rx)[None, :]
            y = linear * fast_tanh(gate * rz[None, :]) + linear
            y = gl.convert_layout(gl.permute(y.to(gl.bfloat16), (1, 0)), zl)
            if now < last:
                rows = now * BM + gl.arange(0, BM, gl.SliceLayout(1, zl))
                columns = gl.arange(0, WIDTH, gl.SliceLayout(0, zl))
                gl.store(out_ptr + rows.to(gl.int64)[:, None] * WIDTH + columns[None, :], y)
            rx, rz = rx_s.index(following).load(along), rz_s.index(following).load(along)
            gate, linear = warpgroup_mma_wait(0, deps=[next_gate, next_linear])
            slot = following
    async_copy.wait_group(0)


@gluon.jit
def fetch_pair(w_ptr, into, start, WIDTH: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Rows of w_a and w_b in turns of eight, as `transition.kernels.load_pair`, on their way."""
    r = gl.arange(0, 2 * BN, gl.SliceLayout(1, layout))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    j = start + r // 16 * 8 + r % 8
    cells = w_ptr + (r // 8 % 2 * (H * WIDTH) + j * WIDTH)[:, None] + c[None, :]
    async_copy.async_copy_global_to_shared(into, cells)


@gluon.jit
def fetch_columns(w_ptr, into, start, WIDTH: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Columns `start` to `start + BN` of w_out, on their way."""
    c = gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    j = start + gl.arange(0, BN, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(into, w_ptr + c[:, None] * H + j[None, :])


@gluon.jit
def half_normal(x_ptr, gamma_ptr, beta_ptr, at, eps, WIDTH: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """LN(x) / 2 of BM rows from `at` on."""
    rows = at + gl.arange(0, BM, gl.SliceLayout(1, layout))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    x = gl.load(x_ptr + rows.to(gl.int64)[:, None] * WIDTH + c[None, :]).to(gl.float32)
    x = x - (gl.sum(x, 1) / WIDTH)[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) / WIDTH + eps)
    gamma, beta = gl.load(gamma_ptr + c) * 0.5, gl.load(beta_ptr + c) * 0.5
    return (x * rstd[:, None] * gamma[None, :] + beta[None, :]).to(gl.bfloat16)


@gluon.jit
def hidden(pair, layout: gl.constexpr):
    """swish(a) · b / 2 of a chunk, as the operand of the next product."""
    R: gl.constexpr = pair.shape[0]
    BN: gl.constexpr = pair.shape[1] // 2
    a, b = gl.split(gl.permute(gl.reshape(pair, (R, BN // 8, 2, 8)), (0, 1, 3, 2)))
    h = ((a * fast_tanh(a) + a) * b).to(gl.bfloat16)
    return gl.convert_layout(gl.reshape(h, (R, BN)), layout)


@gluon.jit(do_not_specialize=["group"])
def transition_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, out_ptr, group, eps,
    WIDTH: gl.constexpr, H: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `transition.kernels.forward_kernel`, JOINT, of `group` tiles of BM rows a program; whole tiles only."""
    gl.assume(group > 0)
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    ol: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [num_warps, 1], [1, 0])
    pair_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * BN, 16])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    h_l: gl.constexpr = gl.DotOperandLayout(0, acc_l, 2)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BN if BN < 64 else 128, 16, 2)
    CHUNKS: gl.constexpr = H // BN
    wo_ptr = w_ptr + 2 * H * WIDTH
    n_s = gl.allocate_shared_memory(gl.bfloat16, [BM, WIDTH], wide)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, 2 * BN, WIDTH], wide)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [2, WIDTH, BN], narrow)
    none = gl.full([BM, 2 * BN], 0.0, gl.float32, pair_l)
    for step in range(group):
        at = (gl.program_id(0) * group + step) * BM
        fetch_pair(w_ptr, p_s.index(0), 0, WIDTH, H, BN, xl)
        async_copy.commit_group()
        fetch_pair(w_ptr, p_s.index(1), BN, WIDTH, H, BN, xl)
        fetch_columns(wo_ptr, o_s.index(0), 0, WIDTH, H, BN, ol)
        async_copy.commit_group()
        n_s.store(half_normal(x_ptr, gamma_ptr, beta_ptr, at, eps, WIDTH, BM, xl))
        fence_async_shared()
        async_copy.wait_group(1)
        barrier()
        pair = warpgroup_mma(n_s, p_s.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
        pair = warpgroup_mma_wait(0, deps=[pair])
        acc = gl.full([BM, WIDTH], 0.0, gl.float32, acc_l)
        for j in gl.static_range(CHUNKS):
            async_copy.wait_group(0)
            barrier()
            if j + 1 < CHUNKS:
                w_b = p_s.index((j + 1) % 2).permute((1, 0))
                ahead = warpgroup_mma(n_s, w_b, none, use_acc=False, is_async=True)
                if j + 2 < CHUNKS:
                    fetch_pair(w_ptr, p_s.index(j % 2), (j + 2) * BN, WIDTH, H, BN, xl)
                fetch_columns(wo_ptr, o_s.index((j + 1) % 2), (j + 1) * BN, WIDTH, H, BN, ol)
                async_copy.commit_group()
            h = hidden(pair, h_l)
            acc = warpgroup_mma(h, o_s.index(j % 2).permute((1, 0)), acc, is_async=True)
            if j + 1 < CHUNKS:
                pair, acc, h = warpgroup_mma_wait(0, deps=[ahead, acc, h])
            else:
                acc, h = warpgroup_mma_wait(0, deps=[acc, h])
        # The tile of n is spent: results pass through it on their way to rows.
        n_s.store((acc * 2.0).to(gl.bfloat16))
        barrier()
        rows = at + gl.arange(0, BM, gl.SliceLayout(1, xl))
        cells = out_ptr + rows.to(gl.int64)[:, None] * WIDTH
        gl.store(cells + gl.arange(0, WIDTH, gl.SliceLayout(0, xl))[None, :], n_s.load(xl))
        barrier()
