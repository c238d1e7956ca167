"""Forward kernel of triangle multiplication's output side for Hopper: see `hopper`.

The correction for means and β comes after the products: they do not wait for the statistics of x, which eight lanes of a column
take meanwhile. With w' folded, LN(x)·w = rstd · (x·w') + (-mean·rstd) · Σw' + β·w.
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

from optimized.ops.gluon_parts import WIDTH, barrier, fast_tanh
from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.hopper import TILE, pair_of, places


@gluon.jit
def fetch_rows(z_ptr, into, p, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr, layout: gl.constexpr, on):  # fmt: skip
    """Rows of z at the positions p, on their way; outside the real square any row."""
    _, source, _ = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
    cells = z_ptr + source[:, None] + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(into, cells, mask=on)


@gluon.jit
def load_rows(ptr, first, layout: gl.constexpr):
    """128 rows of weights `[rows, 128]`, from row `first` on."""
    r = first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    return gl.load(ptr + r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :])


@gluon.jit
def fetch_planes(x_ptr, into, start, area, layout: gl.constexpr, on):
    """A tile of all 128 planes of x, on its way."""
    h = gl.arange(0, WIDTH, gl.SliceLayout(1, layout)).to(gl.int64)
    k = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(into, x_ptr + h[:, None] * area + k[None, :], mask=on)


@gluon.jit
def fetch_out(x_ptr, z_ptr, stats_ptr, x_s, z_s, rstd_s, shift_s, step, slot, n_tokens, padded, stride_i, stride_j, area, EVEN: gl.constexpr, zl: gl.constexpr, xl: gl.constexpr, flat: gl.constexpr, on):  # fmt: skip
    """What a tile reads, as one group."""
    start = step * TILE
    fetch_planes(x_ptr, x_s.index(slot), start, area, xl, on)
    rows = start + gl.arange(0, TILE, gl.SliceLayout(1, zl))
    fetch_rows(z_ptr, z_s.index(slot), rows, n_tokens, padded, stride_i, stride_j, EVEN, zl, on)
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
        inside, _, _ = pair_of(p, n_tokens, padded)
        rstd = gl.where(inside, rstd, 0.0)
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
        inside, i, j = pair_of(p, n_tokens, padded)
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
    # For even steps and for odd ones: between accesses to one allocation a barrier would be put.
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
            far = now + STAGES - 1
            fetch_out(x_ptr, z_ptr, stats_ptr, x_s, z_s, rstd_s, shift_s, far, (slot + STAGES - 1) % STAGES, n_tokens, padded, stride_i, stride_j, area, EVEN, zl, xl, flat, far < last)  # fmt: skip
            next_linear, next_gate = products_out(wo, wg, x_s.index(following), z_s.index(following), none)
            values = take_x(x_s.index(following), stats_ptr, (now + 1) * TILE, area, n_tokens, padded, eps, EVEN, columns, now + 1 < last)  # fmt: skip
            of_next[0].store(values[0])
            of_next[1].store(values[1])
            y = gated_out(linear, gate, of_x, rstd_s.index(slot), shift_s.index(slot), sums_s)
            y_s.store(gl.permute(y, (1, 0)))
            barrier()
            put_rows(y_s.load(zl), out_ptr, now * TILE, n_tokens, padded, EVEN, now < last)
            linear, gate = warpgroup_mma_wait(0, deps=[next_linear, next_gate])
            slot = following
    async_copy.wait_group(0)
