"""Output side of triangle multiplication, backward, for Hopper, with the output projection's weight gradient: see `output_lab`.

What `folded_output.backward_kernel` computes, and of `folded_output.weight_kernel` the half of the output projection: rstd · d of it never
leaves the chip. Channels are the rows of all products, as in `hopper_output`: what is between products is their first operand in
registers, and for the one that wants it second goes to shared memory. The next tile's first products run beside this one's end.
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
from optimized.ops.triangle_multiplication.hopper import TILE
from optimized.ops.triangle_multiplication.hopper_output import (
    fetch_planes,
    fetch_rows,
    load_rows,
    products_out,
)


@gluon.jit
def fetch_back(x_ptr, z_ptr, dy_ptr, stats_ptr, x_s, z_s, dy_s, stats_s, step, slot, n_tokens, padded, stride_i, stride_j, area, EVEN: gl.constexpr, zl: gl.constexpr, xl: gl.constexpr, flat: gl.constexpr, on):  # fmt: skip
    """What a tile reads, as one group: x, z, dy, and rstd and shift of x and of z."""
    start = step * TILE
    fetch_planes(x_ptr, x_s.index(slot), start, area, xl, on)
    rows = start + gl.arange(0, TILE, gl.SliceLayout(1, zl))
    fetch_rows(z_ptr, z_s.index(slot), rows, n_tokens, padded, stride_i, stride_j, EVEN, zl, on)
    fetch_rows(dy_ptr, dy_s.index(slot), rows, n_tokens, padded, n_tokens * WIDTH, WIDTH, EVEN, zl, on)
    p = stats_ptr + start + gl.arange(0, TILE, flat)
    for k in gl.static_range(4):
        async_copy.async_copy_global_to_shared(stats_s.index(slot * 4 + k), p + k * area, mask=on)
    async_copy.commit_group()


@gluon.jit
def put_planes(stage, ptr, start, area, layout: gl.constexpr):
    """A tile of all 128 planes, from shared memory to memory."""
    h = gl.arange(0, WIDTH, gl.SliceLayout(1, layout)).to(gl.int64)
    k = start + gl.arange(0, TILE, gl.SliceLayout(0, layout))
    gl.store(ptr + h[:, None] * area + k[None, :], stage.load(layout))


@gluon.jit(do_not_specialize=["group"])
def backward_kernel(
    x_ptr, z_ptr, stats_ptr, folded_ptr, sums_partial_ptr, dy_ptr, dx_ptr, d_gate_ptr,
    gamma_ptr, beta_ptr, w_ptr, dw_partial_ptr, norm_partial_ptr, n_tokens, padded, stride_i, stride_j, group,
    EVEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dx `[128, P, P]` and rstd · d of the gate `[128, P, P]` of `group` tiles of 64 positions, and partial gradients of the output
    projection `[128, 128]` and of its norm.

    stats `[5, P, P]` as the forward pass leaves them, zero in the padding; γ, β and w are the norm's and the packed weights.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TILE, 16])
    sum_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    along: gl.constexpr = gl.SliceLayout(0, acc_l)
    down: gl.constexpr = gl.SliceLayout(1, acc_l)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    area = padded.to(gl.int64) * padded
    wo, wg = load_rows(folded_ptr, 4 * WIDTH, zl), load_rows(folded_ptr, 5 * WIDTH, zl)
    wo = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, wo)
    wg = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, wg)
    sums_s = gl.allocate_shared_memory(gl.float32, [4, WIDTH], plain)
    r = gl.arange(0, WIDTH, flat)
    for k in gl.static_range(4):
        sums_s.index(k).store(gl.load(sums_partial_ptr + (8 + k) * WIDTH + r))
    x_s = gl.allocate_shared_memory(gl.bfloat16, [2, WIDTH, TILE], wide)
    z_s = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, WIDTH], wide)
    dy_s = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, WIDTH], wide)
    stats_s = gl.allocate_shared_memory(gl.float32, [8, TILE], plain)
    d_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, TILE], wide)
    stage_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, TILE], wide)
    none = gl.full([WIDTH, TILE], 0.0, gl.float32, acc_l)
    dw = gl.full([WIDTH, WIDTH], 0.0, gl.float32, sum_l)
    total, means = gl.full([WIDTH], 0.0, gl.float32, down), gl.full([WIDTH], 0.0, gl.float32, down)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    fetch_back(x_ptr, z_ptr, dy_ptr, stats_ptr, x_s, z_s, dy_s, stats_s, first, 0, n_tokens, padded, stride_i, stride_j, area, EVEN, zl, xl, flat, first < last)  # fmt: skip
    fence_async_shared()
    async_copy.wait_group(0)
    barrier()
    linear, gate = products_out(wo, wg, x_s.index(0), z_s.index(0), none)
    linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
    slot = 0
    for step in range(first, last):
        following = 1 - slot
        start = step * TILE
        fetch_back(x_ptr, z_ptr, dy_ptr, stats_ptr, x_s, z_s, dy_s, stats_s, step + 1, following, n_tokens, padded, stride_i, stride_j, area, EVEN, zl, xl, flat, step + 1 < last)  # fmt: skip
        rstd_z = stats_s.index(slot * 4 + 2).load(along)
        shift_z = stats_s.index(slot * 4 + 3).load(along)
        gate = gate * rstd_z[None, :] + (
            sums_s.index(2).load(down)[:, None] * shift_z[None, :] + sums_s.index(3).load(down)[:, None]
        )
        t = fast_tanh(gate)
        # The projected row less its bias.
        rstd = stats_s.index(slot * 4).load(along)
        shift = stats_s.index(slot * 4 + 1).load(along)
        u = linear * rstd[None, :] + sums_s.index(0).load(down)[:, None] * shift[None, :]
        half = 0.5 * dy_s.index(slot).permute((1, 0)).load(acc_l).to(gl.float32)
        d = half * t + half
        d_gate = d * (u + sums_s.index(1).load(down)[:, None])
        d_gate = (d_gate - d_gate * t) * (0.5 * rstd_z)[None, :]
        stage_s.store(d_gate.to(gl.bfloat16))
        d = d * rstd[None, :]
        second = gl.sum(d * u, 0) * (1.0 / WIDTH)
        d = d.to(gl.bfloat16)
        d_s.store(d)
        deviation = gl.where(rstd > 0.0, 1.0 / gl.where(rstd > 0.0, rstd, 1.0), 0.0)
        rounded = d.to(gl.float32)
        total += gl.sum(rounded * deviation[None, :], 1)
        means += gl.sum(rounded * (shift * deviation)[None, :], 1)
        fence_async_shared()
        barrier()
        dx = warpgroup_mma(wo.permute((1, 0)), d_s, none, use_acc=False, is_async=True)
        d = gl.convert_layout(d, gl.DotOperandLayout(0, sum_l, 2))
        dw = warpgroup_mma(d, x_s.index(slot).permute((1, 0)), dw, is_async=True)
        put_planes(stage_s, d_gate_ptr, start, area, xl)
        async_copy.wait_group(0)
        dx, dw, d = warpgroup_mma_wait(0, deps=[dx, dw, d])
        barrier()
        next_linear, next_gate = products_out(wo, wg, x_s.index(following), z_s.index(following), none)
        # Loaded again: kept, they would cost 32 registers through all of the above.
        rstd = stats_s.index(slot * 4).load(along)
        shift = stats_s.index(slot * 4 + 1).load(along)
        normal = x_s.index(slot).load(acc_l).to(gl.float32) * rstd[None, :] + shift[None, :]
        stage_s.store((dx - normal * second[None, :]).to(gl.bfloat16))
        barrier()
        put_planes(stage_s, dx_ptr, start, area, xl)
        linear, gate = warpgroup_mma_wait(0, deps=[next_linear, next_gate])
        barrier()
        slot = following
    async_copy.wait_group(0)
    t = gl.arange(0, WIDTH, gl.SliceLayout(1, sum_l))[:, None]
    h = gl.arange(0, WIDTH, gl.SliceLayout(0, sum_l))
    gamma, beta = gl.load(gamma_ptr + h).to(gl.float32), gl.load(beta_ptr + h).to(gl.float32)
    total = gl.convert_layout(total, gl.SliceLayout(1, sum_l))[:, None]
    m = dw + gl.convert_layout(means, gl.SliceLayout(1, sum_l))[:, None]
    partial = dw_partial_ptr + gl.program_id(0).to(gl.int64) * (WIDTH * WIDTH)
    gl.store(partial + t * WIDTH + h[None, :], m * gamma[None, :] + total * beta[None, :])
    w = gl.load(w_ptr + 4 * WIDTH * WIDTH + t * WIDTH + h[None, :]).to(gl.float32)
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (2 * WIDTH)
    gl.store(share + h, gl.sum(w * m, 0))
    gl.store(share + WIDTH + h, gl.sum(w * total, 0))
