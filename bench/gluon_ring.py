"""The transition for Hopper by three groups of warps that share a ring of weights: see `ring_lab`.

`optimized.ops.transition.hopper_gradient` has two groups, whose operands lie in registers. Forward there is room for three, with
160 registers each; backward where LN(x) and dy lie in shared memory.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import (
    CHANNELS,
    HALF,
    PART,
    ROWS,
    WHOLE,
    WIDTH,
    ask_for,
    barrier,
    fast_tanh,
    in_halves,
    sums_of_lanes,
    turned_about,
)
from optimized.ops.transition.hopper_gradient import (
    UNITS,
    bring,
    differentiated,
    load_rows,
    statistics,
)


@gluon.jit
def half_normal(x, gamma_ptr, beta_ptr, mean, rstd):
    """LN(x) / 2 in bf16."""
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
    n = (x - mean[:, None]) * (0.5 * rstd)[:, None]
    return (n * gl.load(gamma_ptr + c).to(gl.float32)[None, :] + half_beta[None, :]).to(gl.bfloat16)


@gluon.jit
def forward_through(n, pair_s, out_s, full_s, empty_s, turns, STAGES: gl.constexpr):
    """Half of the update of a tile."""
    none = gl.full([ROWS, 2 * UNITS], 0.0, gl.float32, PART)
    y = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    for turn in range(turns):
        none_yet = turn >> 28
        for at in gl.static_range(STAGES):
            mbarrier.wait(full_s.index(at), turn & 1)
            fence_async_shared()
            pair = pair_s.index(at + none_yet)
            both = warpgroup_mma(n, pair.permute((1, 0)), none, use_acc=False, is_async=True)
            if at == 0:
                both = warpgroup_mma_wait(0, deps=[both])
            else:
                both, y, h = warpgroup_mma_wait(0, deps=[both, y, h])  # noqa: F821
                mbarrier.arrive(empty_s.index(at - 1), count=1)
            a, b = in_halves(both, HALF)
            h = ((a * fast_tanh(a) + a) * b).to(gl.bfloat16)
            h = gl.convert_layout(h, gl.DotOperandLayout(0, WHOLE, 2))
            y = warpgroup_mma(h, out_s.index(at + none_yet), y, is_async=True)
        y, h = warpgroup_mma_wait(0, deps=[y, h])
        mbarrier.arrive(empty_s.index(STAGES - 1), count=1)
    return y


@gluon.jit
def forward_tiles(
    x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, own: gl.constexpr,
    pair_s, out_s, full_s, empty_s, GROUPS: gl.constexpr, STAGES: gl.constexpr, ADDED: gl.constexpr,
):  # fmt: skip
    """The update of one tile of each round, or that added to x, by four warps."""
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for both in range(first, last):
        tile = GROUPS * both + own
        p = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside = (p < rows)[:, None]
        cells = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        x = load_rows(x_ptr, cells, inside)
        following = tile + GROUPS
        ask_for(x_ptr, following, (both + 1 < last) & (following * ROWS + ROWS <= rows))
        mean, rstd = statistics(x, eps)
        n = half_normal(x, gamma_ptr, beta_ptr, mean, rstd)
        y = forward_through(n, pair_s, out_s, full_s, empty_s, turns, STAGES)
        y = gl.convert_layout(turned_about(y), CHANNELS) * 2.0
        if ADDED:
            y += load_rows(x_ptr, cells, inside)
        gl.store(out_ptr + cells, y.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["group"])
def forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, out_ptr, rows, group, turns, eps,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, ADDED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y of `group` rounds of GROUPS tiles of 64 rows; `turns`: CHUNKS / STAGES, an even number."""
    gl.assume(rows > 0)
    gl.assume(group > 0)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    pair_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * UNITS, WIDTH], wide)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, UNITS, WIDTH], wide)
    full_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full_s.index(k), count=32)
        mbarrier.init(empty_s.index(k), count=GROUPS)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + GROUPS * ROWS - 1) // (GROUPS * ROWS))
    steps = gl.maximum(last - first, 0) * CHUNKS
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 0, pair_s, out_s, full_s, empty_s, GROUPS, STAGES, ADDED)),
                (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 1, pair_s, out_s, full_s, empty_s, GROUPS, STAGES, ADDED)),
                (bring, (w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 0, pair_s, out_s, full_s, empty_s, GROUPS, STAGES, ADDED)),
                (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 1, pair_s, out_s, full_s, empty_s, GROUPS, STAGES, ADDED)),
                (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 2, pair_s, out_s, full_s, empty_s, GROUPS, STAGES, ADDED)),
                (bring, (w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


@gluon.jit
def backward_through(n_s, dy_s, pair_s, out_s, full_s, empty_s, turns, STAGES: gl.constexpr):
    """The gradient to LN(x) of a tile, whose LN(x) and dy lie in shared memory."""
    none = gl.full([ROWS, 2 * UNITS], 0.0, gl.float32, PART)
    none_h = gl.full([ROWS, UNITS], 0.0, gl.float32, HALF)
    dn = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    for turn in range(turns):
        none_yet = turn >> 28
        for at in gl.static_range(STAGES):
            mbarrier.wait(full_s.index(at), turn & 1)
            fence_async_shared()
            pair = pair_s.index(at + none_yet)
            both = warpgroup_mma(n_s, pair.permute((1, 0)), none, use_acc=False, is_async=True)
            dh = warpgroup_mma(
                dy_s, out_s.index(at + none_yet).permute((1, 0)), none_h, use_acc=False, is_async=True
            )
            if at == 0:
                both, dh = warpgroup_mma_wait(0, deps=[both, dh])
            else:
                both, dh, dn, da, db = warpgroup_mma_wait(0, deps=[both, dh, dn, da, db])  # noqa: F821
                mbarrier.arrive(empty_s.index(at - 1), count=1)
            a, b = in_halves(both, HALF)
            da, db = differentiated(a, b, dh)
            dn = warpgroup_mma(da, pair.slice(0, UNITS, 0), dn, is_async=True)
            dn = warpgroup_mma(db, pair.slice(UNITS, UNITS, 0), dn, is_async=True)
        dn, da, db = warpgroup_mma_wait(0, deps=[dn, da, db])
        mbarrier.arrive(empty_s.index(STAGES - 1), count=1)
    return dn


@gluon.jit
def gradient_tiles(
    x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share_ptr, more_ptr, rows, eps, first, last, turns, own: gl.constexpr,
    pair_s, out_s, full_s, empty_s, n_s, dy_s, beta_s, gamma_s, GROUPS: gl.constexpr, STAGES: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """dx of one tile of each round, by four warps."""
    sl: gl.constexpr = sums_of_lanes(gl.full([ROWS, WIDTH], 0.0, gl.float32, CHANNELS)).type.layout
    beta_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    gamma_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for both in range(first, last):
        p = (GROUPS * both + own) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside = (p < rows)[:, None]
        cells = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        dy_s.store(turned_about(gl.load(dy_ptr + cells, mask=inside, other=0.0)))
        x = load_rows(x_ptr, cells, inside)
        mean, rstd = statistics(x, eps)
        n = half_normal(x, gamma_ptr, beta_ptr, mean, rstd)
        gl.store(n_ptr + cells, n, mask=inside)
        n_s.store(turned_about(n))
        fence_async_shared()
        barrier()
        dn = backward_through(n_s, dy_s, pair_s, out_s, full_s, empty_s, turns, STAGES)
        # x is read again (from L2): keeping the tile would cost its registers through the products.
        x = load_rows(x_ptr, cells, inside)
        normal = (x - mean[:, None]) * rstd[:, None]
        dn = gl.convert_layout(turned_about(dn), CHANNELS)
        beta_s.store(beta_s.load(sl) + sums_of_lanes(dn))
        gamma_s.store(gamma_s.load(sl) + sums_of_lanes(dn * normal))
        dn = dn * gl.load(gamma_ptr + c).to(gl.float32)[None, :]
        less = gl.sum(dn, 1) * (1.0 / WIDTH)
        slope = gl.sum(dn * normal, 1) * (1.0 / WIDTH)
        dx = (dn - less[:, None] - normal * slope[:, None]) * rstd[:, None]
        if MORE:
            barrier()
            dx += load_rows(more_ptr, cells, inside)
        gl.store(dx_ptr + cells, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    barrier()
    columns: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 4], [1, 0])
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, columns))
    gl.store(share_ptr + t, gl.sum(gamma_s.load(columns), 0))
    gl.store(share_ptr + WIDTH + t, gl.sum(beta_s.load(columns), 0))


@gluon.jit(do_not_specialize=["group"])
def input_gradient_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, dy_ptr, dx_ptr, n_ptr, norm_partial_ptr, more_ptr, rows, group, turns, eps,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dx and LN(x) / 2 `[rows, 128]` of `group` rounds of GROUPS tiles of 64 rows, and as many shares of dγ and dβ."""
    gl.assume(rows > 0)
    gl.assume(group > 0)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    banks: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    pair_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * UNITS, WIDTH], wide)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, UNITS, WIDTH], wide)
    full_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    a_n = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    a_dy = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    b_n = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    b_dy = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    c_n = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    c_dy = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    a_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    a_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    c_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    c_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    for k in gl.static_range(STAGES):
        mbarrier.init(full_s.index(k), count=32)
        mbarrier.init(empty_s.index(k), count=GROUPS)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + GROUPS * ROWS - 1) // (GROUPS * ROWS))
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (2 * GROUPS * WIDTH)
    steps = gl.maximum(last - first, 0) * CHUNKS
    gl.warp_specialize(
        [
            (gradient_tiles, (x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share, more_ptr, rows, eps, first, last, turns, 0, pair_s, out_s, full_s, empty_s, a_n, a_dy, a_beta, a_gamma, GROUPS, STAGES, MORE)),
            (gradient_tiles, (x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share + 2 * WIDTH, more_ptr, rows, eps, first, last, turns, 1, pair_s, out_s, full_s, empty_s, b_n, b_dy, b_beta, b_gamma, GROUPS, STAGES, MORE)),
            (gradient_tiles, (x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share + 4 * WIDTH, more_ptr, rows, eps, first, last, turns, 2, pair_s, out_s, full_s, empty_s, c_n, c_dy, c_beta, c_gamma, GROUPS, STAGES, MORE)),
            (bring, (w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip
