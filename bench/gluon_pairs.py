"""Triangle multiplication's forward kernels for Hopper as two programs of 8 warps and 128 registers a multiprocessor: see `hopper_lab`.

`hopper_project.project_kernel` takes all 256 channels of a tile in one program of 8 warps. Its warps issue their matrix instructions
in turns with arithmetic, in order, so that neither runs at its own pace: 5000 cycles a tile, of which the products need 2300 and
the arithmetic some 2000. Here a program takes 128 of the channels and waits for its products, in 128 registers and 109 KiB, so that
two are on a multiprocessor, of which one multiplies while the other computes. The tile is read twice from L2, and its statistics
are taken twice, or are given. 523 instructions a tile and program, 339 with statistics given; none spilled.

The output side likewise: a program of 8 warps in 128 registers holds both matrices and one tile, and has the next fetched when the
products are done; its results leave from the registers, two channels a lane. 16 bytes spilled, 40 where tiles are not whole.

Compiled for sm_90 by Triton 3.6 and 3.7; not run yet.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles functions here: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import barrier
from optimized.ops.triangle_multiplication.hopper import TILE, WIDTH, fetch_rows, load_rows
from optimized.ops.triangle_multiplication.hopper_output import (
    fetch_planes,
    gated_out,
    products_out,
    put_rows,
    take_x,
)
from optimized.ops.triangle_multiplication.hopper_project import (
    MOMENTS_OF_LANES,
    ROWS_OF_LANES,
    RUNS,
    beside_weights,
    gated_in,
    in_turns,
    load_kept,
    position_of,
    products,
    put_channels,
    row_in_order,
    take,
)


@gluon.jit
def load_given(stats_ptr, start, area, layout: gl.constexpr):
    """rstd, -mean·rstd, and rstd where it is kept, of a tile's positions."""
    stats = stats_ptr + start + gl.arange(0, TILE, layout)
    return gl.load(stats), gl.load(stats + area), gl.load(stats + 2 * area)


@gluon.jit
def put_given(moments_s, rstd_s, given):
    """As `take`, from statistics that are there."""
    rstd, shift = row_in_order(given[0]), row_in_order(given[1])
    lanes: gl.constexpr = gl.SliceLayout(1, MOMENTS_OF_LANES)
    e = gl.arange(0, 16, gl.SliceLayout(0, MOMENTS_OF_LANES))
    deviation = gl.where(rstd > 0.0, 1.0 / gl.where(rstd > 0.0, rstd, 1.0), 0.0)
    less_mean = gl.convert_layout(shift * deviation, lanes, assert_trivial=True)
    deviation = gl.convert_layout(deviation, lanes, assert_trivial=True)
    moments_s.store((in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16))
    rstd_s.store(given[2])


@gluon.jit(do_not_specialize=["group"])
def pair_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """a (`program_id(1)` 0) or b, 128 channels of `[256, P, P]`, of `group` tiles of 64 positions; a's also the statistics
    `[3, P, P]` of z, unless they are GIVEN."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    ordered: gl.constexpr = row_in_order(gl.arange(0, TILE, gl.SliceLayout(1, ROWS_OF_LANES))).type.layout
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    channel = gl.program_id(1) * WIDTH
    linear_w = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, WIDTH], wide, load_rows(folded_ptr, channel, zl)
    )
    gate_w = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, load_rows(folded_ptr, channel + 2 * WIDTH, zl))  # fmt: skip
    of_linear = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, 16], thin, beside_weights(sums_partial_ptr, channel, bl))  # fmt: skip
    of_gate = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, 16], thin, beside_weights(sums_partial_ptr, channel + 2 * WIDTH, bl))  # fmt: skip
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, WIDTH], wide)
    moments_s = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, 16], thin)
    rstd_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    columns = position_of(gl.arange(0, TILE, gl.SliceLayout(1, zl)))
    out_ptr += channel.to(gl.int64) * area
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    writes = channel == 0
    for s in gl.static_range(STAGES):
        start = (first + s) * TILE
        fetch_rows(z_ptr, z_s.index(s), start + columns, n_tokens, padded, stride_i, stride_j, EVEN, zl, first + s < last)  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(STAGES - 1)
    barrier()
    if GIVEN:
        put_given(moments_s.index(0), rstd_s.index(0), load_given(stats_ptr, first * TILE, area, ordered))
    else:
        inside, keep = load_kept(mask_ptr, first * TILE, n_tokens, padded, MASKED, EVEN, ordered)
        take(z_s.index(0), moments_s.index(0), rstd_s.index(0), inside, keep, stats_ptr, first * TILE, area, eps, writes)  # fmt: skip
    slot = 0
    for step in range(first, last):
        now = (step - first) % 2
        following = (slot + 1) % STAGES
        beyond = gl.minimum(step + 1, last - 1) * TILE
        if GIVEN:
            given = load_given(stats_ptr, beyond, area, ordered)
        else:
            inside, keep = load_kept(mask_ptr, beyond, n_tokens, padded, MASKED, EVEN, ordered)
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        barrier()
        linear, gate = products(
            linear_w, gate_w, of_linear, of_gate, z_s.index(slot), moments_s.index(now), none
        )
        if GIVEN:
            put_given(moments_s.index(1 - now), rstd_s.index(1 - now), given)
        else:
            take(z_s.index(following), moments_s.index(1 - now), rstd_s.index(1 - now), inside, keep, stats_ptr, beyond, area, eps, writes & (step + 1 < last))  # fmt: skip
        linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        barrier()
        far = step + STAGES
        fetch_rows(z_ptr, z_s.index(slot), far * TILE + columns, n_tokens, padded, stride_i, stride_j, EVEN, zl, far < last)  # fmt: skip
        async_copy.commit_group()
        put_channels(gated_in(linear, gate, rstd_s.index(now)), out_ptr, 0, step * TILE, area, RUNS)
        slot = following
    async_copy.wait_group(0)


PAIRS_OF_LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [8, 0], [16, 0], [32, 0]],
        lane_bases=[[2, 0], [4, 0], [0, 2], [0, 4], [0, 8]],
        warp_bases=[[0, 16], [0, 32], [0, 64]],
        block_bases=[],
        shape=[64, 128],
    )
)
"""The products' layout turned, with channels in order: a lane's two of a position side by side, 32 bytes of eight lanes."""


@gluon.jit
def channel_of(m):
    """Which channel row m of the products is."""
    return m // 16 * 16 + m % 8 * 2 + m // 8 % 2


@gluon.jit
def load_in_turns(ptr, first, layout: gl.constexpr):
    """128 rows of weights `[rows, 128]`, from row `first` on, as `channel_of` has them."""
    r = first + channel_of(gl.arange(0, WIDTH, gl.SliceLayout(1, layout)))
    return gl.load(ptr + r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :])


@gluon.jit(do_not_specialize=["group"])
def output_pair_kernel(
    x_ptr, z_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `hopper_output.output_kernel`, a tile at a time, which is on its way while the one before is computed."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [1, num_warps], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    wo = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, WIDTH], wide, load_in_turns(folded_ptr, 4 * WIDTH, zl)
    )
    wg = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, WIDTH], wide, load_in_turns(folded_ptr, 5 * WIDTH, zl)
    )
    sums_s = gl.allocate_shared_memory(gl.float32, [4, WIDTH], plain)
    r = channel_of(gl.arange(0, WIDTH, flat))
    for k in gl.static_range(4):
        sums_s.index(k).store(gl.load(sums_partial_ptr + (8 + k) * WIDTH + r) * (0.5 if k == 1 else 1.0))
    x_s = gl.allocate_shared_memory(gl.bfloat16, [1, WIDTH, TILE], wide)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, WIDTH], wide)
    # Of this tile and of the next.
    rstd_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    shift_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    of_x = (
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
    )
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    start = first * TILE
    fetch_planes(x_ptr, x_s.index(0), start, area, xl, first < last)
    rows = gl.arange(0, TILE, gl.SliceLayout(1, zl))
    fetch_rows(
        z_ptr, z_s.index(0), start + rows, n_tokens, padded, stride_i, stride_j, EVEN, zl, first < last
    )
    p = stats_ptr + 2 * area + gl.arange(0, TILE, flat)
    async_copy.async_copy_global_to_shared(rstd_s.index(0), p + start)
    async_copy.async_copy_global_to_shared(shift_s.index(0), p + area + start)
    async_copy.commit_group()
    fence_async_shared()
    for step in range(first, last):
        now = (step - first) % 2
        start = step * TILE
        async_copy.wait_group(0)
        barrier()
        linear, gate = products_out(wo, wg, x_s.index(0), z_s.index(0), none)
        values = take_x(
            x_s.index(0), stats_ptr, start, area, n_tokens, padded, eps, EVEN, columns, step < last
        )
        of_x[0].store(values[0])
        of_x[1].store(values[1])
        linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        barrier()
        far = start + TILE
        on = step + 1 < last
        fetch_planes(x_ptr, x_s.index(0), far, area, xl, on)
        fetch_rows(z_ptr, z_s.index(0), far + rows, n_tokens, padded, stride_i, stride_j, EVEN, zl, on)
        async_copy.async_copy_global_to_shared(rstd_s.index(1 - now), p + far, mask=on)
        async_copy.async_copy_global_to_shared(shift_s.index(1 - now), p + area + far, mask=on)
        async_copy.commit_group()
        y = gated_out(linear, gate, of_x, rstd_s.index(now), shift_s.index(now), sums_s)
        y = gl.reshape(gl.permute(gl.reshape(y, (8, 2, 8, TILE)), (0, 2, 1, 3)), (WIDTH, TILE))
        y = gl.convert_layout(gl.permute(y, (1, 0)), PAIRS_OF_LANES)
        put_rows(y, out_ptr, start, n_tokens, padded, EVEN, step < last)
    async_copy.wait_group(0)
