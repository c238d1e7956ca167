"""Forward kernels of triangle multiplication for Hopper in Gluon, Triton's lower level, which says itself when a product is
waited for.

What they compute is what `folded.project_kernel` and `folded_output.forward_kernel` compute, from the same folded weights.
Two things differ:

- Each takes the statistics of what it reads itself, beside the products, so that nothing reads z or the contraction
  before: four and a half passes over N²·128 values instead of six and a half. The products do not wait for them: with
  w' folded, LN(z)·w = rstd · (z·w') + (-mean·rstd) · Σw' + β·w, and all but z·w' comes after the product.
- One program holds all weights and takes every channel of a tile, whose products run beside the arithmetic of the ones
  before: those of b's channels beside a's, of the next tile beside b's. In Triton four programs read the tile each from the
  second-level cache, and wait for a product where they ask for it.

Channels are the rows of the products, positions their columns. The matrix unit leaves a lane columns 8j + 2q and 8j + 2q + 1:
rows of z lie in shared memory in such an order that these are twice eight positions one after another, which go to memory
from the registers, 16 bytes a lane and 64 of four lanes.

bf16, 128 channels of both kinds, sm_90; strides and addresses of z divisible by 16.
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

from optimized.ops.gluon_parts import barrier, fast_tanh
from optimized.ops.names import profiled_as

WIDTH = gl.constexpr(128)
"""Channels of z and of the contraction."""
TILE = gl.constexpr(64)
"""Positions of a step."""

RUNS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 64],
    )
)
"""The products' layout with columns as positions: eight of a lane one after another, and four lanes beside each other."""
ROWS_OF_LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [4, 0], [1, 0], [2, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
"""Four lanes hold a row of z: two exchanges for a sum. Eight lanes that read at once read from all banks."""


@gluon.jit
def position_of(n):
    """Which position of a tile column n of its products is."""
    return n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2


@gluon.jit
def in_order(x):
    """`[rows, 64]` of columns as they are computed, as positions: a view of what each lane holds."""
    return gl.reshape(gl.permute(gl.reshape(x, (x.shape[0], 2, 4, 4, 2)), (0, 1, 3, 2, 4)), (x.shape[0], 64))


@gluon.jit
def row_in_order(x):
    """`[64]` of columns as they are computed, as positions."""
    return gl.reshape(gl.permute(gl.reshape(x, (2, 4, 4, 2)), (0, 2, 1, 3)), (64,))


@gluon.jit
def place(p, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr):
    """Whether positions p of the padded square are inside the real one, and where their rows of z begin; outside, any row."""
    if EVEN:
        return p >= 0, p.to(gl.int64) * WIDTH
    else:
        i = p // padded
        j = p % padded
        inside = (i < n_tokens) & (j < n_tokens)
        return inside, gl.where(inside, i.to(gl.int64) * stride_i + j.to(gl.int64) * stride_j, 0)


@gluon.jit
def fetch_rows(z_ptr, into, start, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr, PERMUTED: gl.constexpr, layout: gl.constexpr, on):  # fmt: skip
    """Rows of z of the tile at position `start`, on their way."""
    n = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    p = start + (position_of(n) if PERMUTED else n)
    _, source = place(p, n_tokens, padded, stride_i, stride_j, EVEN)
    cells = z_ptr + source[:, None] + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(into, cells, mask=on)


@gluon.jit
def row_statistics(z, eps):
    """rstd and -mean·rstd of the rows `[64, 128]`; two passes in fp32."""
    z = z.to(gl.float32)
    mean = gl.sum(z, 1) / WIDTH
    off = z - mean[:, None]
    rstd = gl.rsqrt(gl.sum(off * off, 1) / WIDTH + eps)
    return rstd, -mean * rstd


@gluon.jit
def gated_in(linear, gate, taken, sums_s, HALF: gl.constexpr, ALL: gl.constexpr):
    """Linear part · σ(gate) of the products of one half of the channels, zero where a position is left out; ALL: none is."""
    linear, gate = in_order(linear), in_order(gate)
    along: gl.constexpr = gl.SliceLayout(0, linear.type.layout)
    down: gl.constexpr = gl.SliceLayout(1, linear.type.layout)
    rstd, shift = taken[0].load(along)[None, :], taken[1].load(along)[None, :]
    sums, biases = sums_s.index(HALF * 4).load(down)[:, None], sums_s.index(HALF * 4 + 1).load(down)[:, None]
    linear = linear * rstd + (sums * shift + biases)
    sums, biases = sums_s.index(HALF * 4 + 2).load(down)[:, None], sums_s.index(HALF * 4 + 3).load(down)[:, None]  # fmt: skip
    gate = gate * rstd + (sums * shift + biases)
    if not ALL:
        linear = linear * taken[2].load(along)[None, :]
    return (linear * fast_tanh(gate) + linear).to(gl.bfloat16)


@gluon.jit
def put_channels(value, out_ptr, first, start, area, layout: gl.constexpr):
    """128 channels of a tile to the planes `first` on."""
    t = first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    k = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    gl.store(out_ptr + t.to(gl.int64)[:, None] * area + k[None, :], gl.convert_layout(value, layout))


@gluon.jit
def products(linear, gate, z_s, none):
    """Both products of a half of the channels, asked for."""
    z = z_s.permute((1, 0))
    first = warpgroup_mma(linear, z, none, use_acc=False, is_async=True)
    return first, warpgroup_mma(gate, z, none, use_acc=False, is_async=True)


@gluon.jit
def load_kept(
    mask_ptr, start, n_tokens, padded, MASKED: gl.constexpr, EVEN: gl.constexpr, layout: gl.constexpr
):
    """Which positions of a tile are real, and which of them the mask keeps."""
    p = start + gl.arange(0, TILE, layout)
    inside = p >= 0
    cell = p.to(gl.int64)
    if not EVEN:
        i = p // padded
        j = p % padded
        inside = (i < n_tokens) & (j < n_tokens)
        cell = i.to(gl.int64) * n_tokens + j
    keep = inside
    if MASKED:
        keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
    return inside, keep


@gluon.jit
def take(z_s, inside, keep, stats_ptr, start, area, eps, on):
    """rstd, -mean·rstd and 1 where a position is kept, of a tile of z; to memory too, rstd where it is kept instead of the 1."""
    rstd, shift = row_statistics(z_s.load(ROWS_OF_LANES), eps)
    rstd, shift = gl.where(inside, row_in_order(rstd), 0.0), gl.where(inside, row_in_order(shift), 0.0)
    keep = gl.where(keep, 1.0, 0.0)
    p = start + gl.arange(0, TILE, rstd.type.layout)
    gl.store(stats_ptr + p, rstd, mask=(p >= 0) & on)
    gl.store(stats_ptr + area + p, shift, mask=(p >= 0) & on)
    gl.store(stats_ptr + 2 * area + p, rstd * keep, mask=(p >= 0) & on)
    return rstd, shift, keep


@gluon.jit
def put_taken(taken, values, ALL: gl.constexpr):
    """What `take` gave, to shared memory."""
    taken[0].store(values[0])
    taken[1].store(values[1])
    if not ALL:
        taken[2].store(values[2])


@gluon.jit
def load_rows(ptr, first, layout: gl.constexpr):
    """128 rows of weights `[rows, 128]`, from row `first` on."""
    r = first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    return gl.load(ptr + r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :])


@gluon.jit(repr=profiled_as("triangle_multiplication_project_hopper"), do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """a and b, `[256, P, P]`, and the statistics `[3, P, P]` of z, of `group` tiles of 64 positions.

    Tiles are whole, since P is a multiple of 16. EVEN: N is P and z contiguous. The weights of a stay in registers, those of b
    in shared memory.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    # Where the statistics of rows are, in the order of positions.
    ordered: gl.constexpr = row_in_order(gl.arange(0, TILE, gl.SliceLayout(1, ROWS_OF_LANES))).type.layout
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    w_l: gl.constexpr = gl.DotOperandLayout(0, acc_l, 2)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    # Linear part of a, of b, then the gates.
    linear_a = gl.convert_layout(load_rows(folded_ptr, 0, zl), w_l)
    gate_a = gl.convert_layout(load_rows(folded_ptr, 2 * WIDTH, zl), w_l)
    linear_b, gate_b = load_rows(folded_ptr, WIDTH, zl), load_rows(folded_ptr, 3 * WIDTH, zl)
    linear_b = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, linear_b)
    gate_b = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, gate_b)
    # Σw' and β·w of the linear part and of the gate, of a and then of b.
    sums_s = gl.allocate_shared_memory(gl.float32, [8, WIDTH], plain)
    r = gl.arange(0, WIDTH, flat)
    for k in gl.static_range(8):
        row = (k // 4 + k // 2 % 2 * 2 + k % 2 * 4) * WIDTH
        sums_s.index(k).store(gl.load(sums_partial_ptr + row + r))
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, WIDTH], wide)
    # Of this step and of the next.
    rstd_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    shift_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    keep_s = gl.allocate_shared_memory(gl.float32, [2, TILE], plain)
    ALL: gl.constexpr = EVEN and not MASKED
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    for s in gl.static_range(STAGES - 1):
        start = (first + s) * TILE
        fetch_rows(z_ptr, z_s.index(s), start, n_tokens, padded, stride_i, stride_j, EVEN, True, zl, first + s < last)  # fmt: skip
        async_copy.commit_group()
    inside, keep = load_kept(mask_ptr, first * TILE, n_tokens, padded, MASKED, EVEN, ordered)
    fence_async_shared()
    async_copy.wait_group(STAGES - 2)
    barrier()
    taken = (rstd_s.index(0), shift_s.index(0), keep_s.index(0))
    put_taken(taken, take(z_s.index(0), inside, keep, stats_ptr, first * TILE, area, eps, first < last), ALL)
    linear, gate = products(linear_a, gate_a, z_s.index(0), none)
    linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
    slot = 0
    for step in range(first, last):
        now = (step - first) % 2
        following = (slot + 1) % STAGES
        async_copy.wait_group(STAGES - 3)
        # The next tile and this one's statistics are there, and every warp is done with the tile before.
        barrier()
        of_b, gate_of_b = products(linear_b, gate_b, z_s.index(slot), none)
        beyond = gl.minimum(step + 1, last - 1) * TILE
        inside, keep = load_kept(mask_ptr, beyond, n_tokens, padded, MASKED, EVEN, ordered)
        far = step + STAGES - 1
        fetch_rows(z_ptr, z_s.index((slot + STAGES - 1) % STAGES), far * TILE, n_tokens, padded, stride_i, stride_j, EVEN, True, zl, far < last)  # fmt: skip
        async_copy.commit_group()
        taken = (rstd_s.index(now), shift_s.index(now), keep_s.index(now))
        put_channels(gated_in(linear, gate, taken, sums_s, 0, ALL), out_ptr, 0, step * TILE, area, RUNS)
        of_b, gate_of_b = warpgroup_mma_wait(0, deps=[of_b, gate_of_b])
        linear, gate = products(linear_a, gate_a, z_s.index(following), none)
        values = take(z_s.index(following), inside, keep, stats_ptr, beyond, area, eps, step + 1 < last)
        put_taken((rstd_s.index(1 - now), shift_s.index(1 - now), keep_s.index(1 - now)), values, ALL)
        put_channels(gated_in(of_b, gate_of_b, taken, sums_s, 1, ALL), out_ptr, WIDTH, step * TILE, area, RUNS)  # fmt: skip
        linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        slot = following
    async_copy.wait_group(0)


@gluon.jit
def fetch_planes(x_ptr, into, start, area, layout: gl.constexpr, on):
    """A tile of all 128 planes of x, on its way."""
    h = gl.arange(0, WIDTH, gl.SliceLayout(1, layout)).to(gl.int64)
    k = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(into, x_ptr + h[:, None] * area + k[None, :], mask=on)


@gluon.jit
def fetch_out(x_ptr, z_ptr, stats_ptr, x_s, z_s, rstd_s, shift_s, step, slot, n_tokens, padded, stride_i, stride_j, area, EVEN: gl.constexpr, zl: gl.constexpr, xl: gl.constexpr, flat: gl.constexpr, on):  # fmt: skip
    """What a tile of the output side reads, as one group."""
    start = step * TILE
    fetch_planes(x_ptr, x_s.index(slot), start, area, xl, on)
    fetch_rows(z_ptr, z_s.index(slot), start, n_tokens, padded, stride_i, stride_j, EVEN, False, zl, on)
    p = stats_ptr + 2 * area + start + gl.arange(0, TILE, flat)
    async_copy.async_copy_global_to_shared(rstd_s.index(slot), p, mask=on)
    async_copy.async_copy_global_to_shared(shift_s.index(slot), p + area, mask=on)
    async_copy.commit_group()


@gluon.jit
def take_x(x_s, stats_ptr, start, area, n_tokens, padded, eps, EVEN: gl.constexpr, layout: gl.constexpr, on):
    """Half of rstd and of -mean·rstd of the columns of x, which are put to memory; two passes in fp32."""
    x = x_s.load(layout).to(gl.float32)
    mean = gl.sum(x, 0) / WIDTH
    off = x - mean[None, :]
    rstd = gl.rsqrt(gl.sum(off * off, 0) / WIDTH + eps)
    p = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    if not EVEN:
        rstd = gl.where((p // padded < n_tokens) & (p % padded < n_tokens), rstd, 0.0)
    shift = -mean * rstd
    gl.store(stats_ptr + p, rstd, mask=(p >= 0) & on)
    gl.store(stats_ptr + area + p, shift, mask=(p >= 0) & on)
    return 0.5 * rstd, 0.5 * shift


@gluon.jit
def products_out(linear, gate, x_s, z_s, none):
    """Linear part and gate of a tile, channels as rows, asked for."""
    first = warpgroup_mma(linear, x_s, none, use_acc=False, is_async=True)
    return first, warpgroup_mma(gate, z_s.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def gated_out(linear, gate, of_x, rstd_s, shift_s, sums_s):
    """Linear part · σ(gate) of a tile, channels as rows."""
    along: gl.constexpr = gl.SliceLayout(0, linear.type.layout)
    down: gl.constexpr = gl.SliceLayout(1, linear.type.layout)
    rstd, shift = of_x[0].load(along)[None, :], of_x[1].load(along)[None, :]
    linear = linear * rstd + (sums_s.index(0).load(down)[:, None] * shift + sums_s.index(1).load(down)[:, None])  # fmt: skip
    rstd, shift = rstd_s.load(along)[None, :], shift_s.load(along)[None, :]
    gate = gate * rstd + (sums_s.index(2).load(down)[:, None] * shift + sums_s.index(3).load(down)[:, None])
    return (linear * fast_tanh(gate) + linear).to(gl.bfloat16)


@gluon.jit
def put_rows(y, out_ptr, start, n_tokens, padded, EVEN: gl.constexpr, on):
    """A tile of rows of y, to memory."""
    layout: gl.constexpr = y.type.layout
    p = start + gl.arange(0, TILE, gl.SliceLayout(1, layout))
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    if EVEN:
        gl.store(out_ptr + p.to(gl.int64)[:, None] * WIDTH + t, y, mask=on)
    else:
        i = p // padded
        j = p % padded
        inside = (i < n_tokens) & (j < n_tokens)
        cell = i.to(gl.int64) * n_tokens + j
        gl.store(out_ptr + cell[:, None] * WIDTH + t, y, mask=inside[:, None] & on)


@gluon.jit(repr=profiled_as("triangle_multiplication_output_hopper"), do_not_specialize=["group"])
def output_kernel(
    x_ptr, z_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y `[N, N, 128]` of `group` tiles of 64 positions.

    stats `[5, P, P]`: the first two, those of x, are written; of the others two are read.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    # Eight lanes hold a column of x: three exchanges for a sum.
    columns: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [1, num_warps], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    # The six matrices lie one after another: out and g behind those of the input projections.
    wo, wg = load_rows(folded_ptr, 4 * WIDTH, zl), load_rows(folded_ptr, 5 * WIDTH, zl)
    wo = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, wo)
    wg = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, wg)
    sums_s = gl.allocate_shared_memory(gl.float32, [4, WIDTH], plain)
    r = gl.arange(0, WIDTH, flat)
    for k in gl.static_range(4):
        # With half of the linear part no constant is needed: x · σ = x/2 + x/2 · tanh.
        sums_s.index(k).store(gl.load(sums_partial_ptr + (8 + k) * WIDTH + r) * (0.5 if k == 1 else 1.0))
    x_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, WIDTH, TILE], wide)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, WIDTH], wide)
    rstd_s = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], plain)
    shift_s = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], plain)
    # For even steps and for odd ones, as in `project_kernel`.
    of_x_0 = (
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
    )
    of_x_1 = (
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
        gl.allocate_shared_memory(gl.float32, [TILE], plain),
    )
    y_s = gl.allocate_shared_memory(gl.bfloat16, [TILE, WIDTH], wide)
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    for s in gl.static_range(STAGES - 1):
        fetch_out(x_ptr, z_ptr, stats_ptr, x_s, z_s, rstd_s, shift_s, first + s, s, n_tokens, padded, stride_i, stride_j, area, EVEN, zl, xl, flat, first + s < last)  # fmt: skip
    fence_async_shared()
    async_copy.wait_group(STAGES - 2)
    barrier()
    values = take_x(x_s.index(0), stats_ptr, first * TILE, area, n_tokens, padded, eps, EVEN, columns, first < last)  # fmt: skip
    of_x_0[0].store(values[0])
    of_x_0[1].store(values[1])
    linear, gate = products_out(wo, wg, x_s.index(0), z_s.index(0), none)
    linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
    slot = 0
    # Two steps a turn, so that their sums take turns in two sets of registers and none is copied.
    for step in range(first, last, 2):
        for half in gl.static_range(2):
            now = step + half
            following = (slot + 1) % STAGES
            of_x = of_x_0 if half == 0 else of_x_1
            of_next = of_x_1 if half == 0 else of_x_0
            async_copy.wait_group(STAGES - 3)
            barrier()
            next_linear, next_gate = products_out(wo, wg, x_s.index(following), z_s.index(following), none)
            values = take_x(x_s.index(following), stats_ptr, (now + 1) * TILE, area, n_tokens, padded, eps, EVEN, columns, now + 1 < last)  # fmt: skip
            of_next[0].store(values[0])
            of_next[1].store(values[1])
            y = gated_out(linear, gate, of_x, rstd_s.index(slot), shift_s.index(slot), sums_s)
            y_s.store(gl.permute(y, (1, 0)))
            barrier()
            far = now + STAGES - 1
            fetch_out(x_ptr, z_ptr, stats_ptr, x_s, z_s, rstd_s, shift_s, far, (slot + STAGES - 1) % STAGES, n_tokens, padded, stride_i, stride_j, area, EVEN, zl, xl, flat, far < last)  # fmt: skip
            put_rows(y_s.load(zl), out_ptr, now * TILE, n_tokens, padded, EVEN, now < last)
            linear, gate = warpgroup_mma_wait(0, deps=[next_linear, next_gate])
            slot = following
    async_copy.wait_group(0)
