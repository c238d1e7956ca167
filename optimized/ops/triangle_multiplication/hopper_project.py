"""Forward kernel of triangle multiplication's input projections for Hopper: see `hopper`.

A tile's products are asked for half by half, a's channels and b's. As in `folded.project_kernel` the correction for the mean and β
is a product too, with the moments of each position; they are taken two tiles ahead, by the lanes that hold a row.

The matrix unit leaves a lane columns 8j + 2q and 8j + 2q + 1. Rows of z lie in shared memory in such an order that these are
twice eight positions one after another, which go to memory from the registers, 16 bytes a lane and 64 of four lanes.
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
from optimized.ops.triangle_multiplication.hopper import (
    TILE,
    WIDTH,
    fetch_rows,
    load_rows,
    pair_of,
    value_of,
)

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
MOMENTS_OF_LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [4, 0], [1, 0], [2, 0]],
        warp_bases=[[8, 0], [16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 16],
    )
)
"""The lanes that hold a row of z make its moments."""


@gluon.jit
def in_order(x):
    """`[rows, 64]` of columns as they are computed, as positions: a view of what each lane holds."""
    return gl.reshape(gl.permute(gl.reshape(x, (x.shape[0], 2, 4, 4, 2)), (0, 1, 3, 2, 4)), (x.shape[0], 64))


@gluon.jit
def row_in_order(x):
    """`[64]` of columns as they are computed, as positions."""
    return gl.reshape(gl.permute(gl.reshape(x, (2, 4, 4, 2)), (0, 2, 1, 3)), (64,))


@gluon.jit
def gated_in(linear, gate, rstd_s):
    """Linear part · σ(gate) of the products of half of the channels, positions in order; rstd is zero where one is left out."""
    linear, gate = in_order(linear), in_order(gate)
    rstd = rstd_s.load(gl.SliceLayout(0, linear.type.layout))[None, :]
    linear = linear * rstd
    return (linear * fast_tanh(gate * rstd) + linear).to(gl.bfloat16)


@gluon.jit
def put_channels(value, out_ptr, first, start, area, layout: gl.constexpr):
    """128 channels of a tile to the planes `first` on."""
    t = first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    k = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    gl.store(out_ptr + t.to(gl.int64)[:, None] * area + k[None, :], gl.convert_layout(value, layout))


@gluon.jit
def products(linear, gate, beside_linear, beside_gate, z_s, moments_s, none):
    """Both products of half of the channels, asked for."""
    z, moments = z_s.permute((1, 0)), moments_s.permute((1, 0))
    first = warpgroup_mma(linear, z, none, use_acc=False, is_async=True)
    first = warpgroup_mma(beside_linear, moments, first, is_async=True)
    second = warpgroup_mma(gate, z, none, use_acc=False, is_async=True)
    return first, warpgroup_mma(beside_gate, moments, second, is_async=True)


@gluon.jit
def load_kept(
    mask_ptr, start, n_tokens, padded, MASKED: gl.constexpr, EVEN: gl.constexpr, layout: gl.constexpr
):
    """Which positions of a tile are real, and which of them the mask keeps."""
    p = start + gl.arange(0, TILE, layout)
    inside = p >= 0
    cell = p.to(gl.int64)
    if not EVEN:
        inside, i, j = pair_of(p, n_tokens, padded)
        cell = i.to(gl.int64) * n_tokens + j
    keep = inside
    if MASKED:
        keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
    return inside, keep


@gluon.jit
def take(z_s, moments_s, rstd_s, inside, keep, stats_ptr, start, area, eps, on):
    """The statistics of a tile of z to memory; where a position is kept, and its moments, to shared memory.

    Two passes in fp32. Moments are 1 / rstd and -mean in the places that `beside_weights` multiplies.
    """
    z = z_s.load(ROWS_OF_LANES).to(gl.float32)
    mean = gl.sum(z, 1) / WIDTH
    off = z - mean[:, None]
    variance = gl.sum(off * off, 1) / WIDTH + eps
    rstd = gl.rsqrt(variance)
    lanes: gl.constexpr = gl.SliceLayout(1, MOMENTS_OF_LANES)
    e = gl.arange(0, 16, gl.SliceLayout(0, MOMENTS_OF_LANES))
    deviation = gl.convert_layout(variance * rstd, lanes, assert_trivial=True)
    less_mean = gl.convert_layout(-mean, lanes, assert_trivial=True)
    moments_s.store((in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16))
    rstd, shift = gl.where(inside, row_in_order(rstd), 0.0), gl.where(inside, row_in_order(-mean * rstd), 0.0)
    kept = gl.where(keep, rstd, 0.0)
    rstd_s.store(kept)
    p = start + gl.arange(0, TILE, rstd.type.layout)
    gl.store(stats_ptr + p, rstd, mask=(p >= 0) & on)
    gl.store(stats_ptr + area + p, shift, mask=(p >= 0) & on)
    gl.store(stats_ptr + 2 * area + p, kept, mask=(p >= 0) & on)


@gluon.jit
def in_turns(x, e, LOW: gl.constexpr):
    """`[rows, 16]` in fp32: of columns e = 0, 1 and 2 column LOW is what rounding to bf16 leaves of x, the others x rounded."""
    high = x.to(gl.bfloat16).to(gl.float32)
    value = gl.where((e == LOW)[None, :], (x - high)[:, None], high[:, None])
    return gl.where(((e >= 0) & (e < 3))[None, :], value, 0.0)


@gluon.jit
def beside_weights(sums_ptr, first, layout: gl.constexpr):
    """`[128, 16]` in bf16: what the moments of a position are multiplied by, from Σw' and β·w of rows `first` on.

    Both in two parts, as the moments are: the product of their low parts is left out.
    """
    rows = sums_ptr + first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    biases, sums = gl.load(rows + 4 * WIDTH), gl.load(rows)
    return (in_turns(biases, e, 2) + in_turns(sums, e - 3, 2)).to(gl.bfloat16)


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
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    # Where the statistics of rows are, in the order of positions.
    ordered: gl.constexpr = row_in_order(gl.arange(0, TILE, gl.SliceLayout(1, ROWS_OF_LANES))).type.layout
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    w_l: gl.constexpr = gl.DotOperandLayout(0, acc_l, 2)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    # Linear part of a, of b, then the gates.
    linear_a = gl.convert_layout(load_rows(folded_ptr, 0, zl), w_l)
    gate_a = gl.convert_layout(load_rows(folded_ptr, 2 * WIDTH, zl), w_l)
    linear_b, gate_b = load_rows(folded_ptr, WIDTH, zl), load_rows(folded_ptr, 3 * WIDTH, zl)
    linear_b = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, linear_b)
    gate_b = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, gate_b)
    of_linear_a = gl.convert_layout(beside_weights(sums_partial_ptr, 0, bl), w_l)
    of_gate_a = gl.convert_layout(beside_weights(sums_partial_ptr, 2 * WIDTH, bl), w_l)
    of_linear_b = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, 16], thin, beside_weights(sums_partial_ptr, WIDTH, bl)
    )
    of_gate_b = gl.allocate_shared_memory(
        gl.bfloat16, [WIDTH, 16], thin, beside_weights(sums_partial_ptr, 3 * WIDTH, bl)
    )
    z_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, WIDTH], wide)
    moments_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 16], thin)
    rstd_s = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], plain)
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    columns = value_of(gl.arange(0, TILE, gl.SliceLayout(1, zl)))
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    for s in gl.static_range(STAGES - 1):
        start = (first + s) * TILE
        fetch_rows(z_ptr, z_s.index(s), start + columns, n_tokens, padded, stride_i, stride_j, EVEN, zl, first + s < last)  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(STAGES - 3)
    barrier()
    for s in gl.static_range(2):
        start = gl.minimum(first + s, last - 1) * TILE
        inside, keep = load_kept(mask_ptr, start, n_tokens, padded, MASKED, EVEN, ordered)
        take(z_s.index(s), moments_s.index(s), rstd_s.index(s), inside, keep, stats_ptr, start, area, eps, first + s < last)  # fmt: skip
    fence_async_shared()
    barrier()
    linear, gate = products(linear_a, gate_a, of_linear_a, of_gate_a, z_s.index(0), moments_s.index(0), none)
    linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
    slot = 0
    for step in range(first, last):
        following = (slot + 1) % STAGES
        later = (slot + 2) % STAGES
        async_copy.wait_group(STAGES - 4)
        # The tile after the next is there, the statistics of the next are, and every warp is done with the tile before.
        fence_async_shared()
        barrier()
        of_b, gate_of_b = products(linear_b, gate_b, of_linear_b, of_gate_b, z_s.index(slot), moments_s.index(slot), none)  # fmt: skip
        beyond = gl.minimum(step + 2, last - 1) * TILE
        inside, keep = load_kept(mask_ptr, beyond, n_tokens, padded, MASKED, EVEN, ordered)
        far = step + STAGES - 1
        fetch_rows(z_ptr, z_s.index((slot + STAGES - 1) % STAGES), far * TILE + columns, n_tokens, padded, stride_i, stride_j, EVEN, zl, far < last)  # fmt: skip
        async_copy.commit_group()
        put_channels(gated_in(linear, gate, rstd_s.index(slot)), out_ptr, 0, step * TILE, area, RUNS)
        take(z_s.index(later), moments_s.index(later), rstd_s.index(later), inside, keep, stats_ptr, beyond, area, eps, step + 2 < last)  # fmt: skip
        of_b, gate_of_b = warpgroup_mma_wait(0, deps=[of_b, gate_of_b])
        linear, gate = products(linear_a, gate_a, of_linear_a, of_gate_a, z_s.index(following), moments_s.index(following), none)  # fmt: skip
        put_channels(gated_in(of_b, gate_of_b, rstd_s.index(slot)), out_ptr, WIDTH, step * TILE, area, RUNS)
        linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        slot = following
    async_copy.wait_group(0)
