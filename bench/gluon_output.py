"""Backward kernel of triangle multiplication's output side for Hopper with two groups of four warps that do not wait for each other.

What `folded_output.backward_kernel` computes; see `apart_lab`. Positions are the rows of all products: the contraction is turned as
it is read from shared memory, z comes from memory to registers, and gradients of the output are an operand in registers of the
product that makes dx. Rows of the weights lie in such an order that a lane's gradients are eight channels one after another.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from gluon_gradient import CHANNELS, FLAT, HALF, ROWS, WHOLE
from gluon_project import BESIDE
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import barrier, fast_tanh
from optimized.ops.triangle_multiplication.hopper import WIDTH, value_of
from optimized.ops.triangle_multiplication.hopper_gradient import ask_for, places, turned_about
from optimized.ops.triangle_multiplication.hopper_project import in_turns

PART = gl.constexpr(32)
"""Channels of the output at a time."""
X = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
OUTPUTS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
)
"""32 columns of products as channels: eight of a lane one after another."""


@gluon.jit
def in_order(x):
    """`[64, 32]` of columns as products have them, as channels; or the other way: a view of what each lane holds."""
    return gl.reshape(gl.permute(gl.reshape(x, (ROWS, 4, 4, 2)), (0, 2, 1, 3)), (ROWS, PART))


@gluon.jit
def place(w_ptr, sums_ptr, into, beside_s, TURNED: gl.constexpr, wl: gl.constexpr, bl: gl.constexpr):
    """32 rows of weights at a time, in the order of `value_of`, and what moments are multiplied by. TURNED: columns likewise."""
    e = gl.arange(0, 16, gl.SliceLayout(0, bl))
    for k in gl.static_range(4):
        t = k * PART + value_of(gl.arange(0, PART, gl.SliceLayout(1, wl)))
        c = gl.arange(0, WIDTH, gl.SliceLayout(0, wl))
        if TURNED:
            c = value_of(c)
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))
        rows = sums_ptr + k * PART + value_of(gl.arange(0, PART, gl.SliceLayout(1, bl)))
        biases, sums = gl.load(rows + WIDTH), gl.load(rows)
        beside_s.index(k).store((in_turns(biases, e, 2) + in_turns(sums, e - 3, 2)).to(gl.bfloat16))


@gluon.jit
def fetch_x(x_ptr, into, tile, area, on):
    """A tile of all 128 planes of the contraction, on its way."""
    h = gl.arange(0, WIDTH, gl.SliceLayout(1, X)).to(gl.int64)
    k = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, X))
    async_copy.async_copy_global_to_shared(into, x_ptr + h[:, None] * area + k[None, :], mask=on)
    async_copy.commit_group()


@gluon.jit
def moments_of(rstd, shift):
    """1 / rstd and -mean of rows, as an operand: `hopper_project.take`."""
    beside: gl.constexpr = gl.SliceLayout(1, BESIDE)
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    deviation = gl.convert_layout(1.0 / gl.where(rstd > 0.0, rstd, 1.0), beside, assert_trivial=True)
    less_mean = gl.convert_layout(shift, beside, assert_trivial=True) * deviation
    moments = (in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16)
    return gl.convert_layout(moments, gl.DotOperandLayout(0, HALF, 2))


@gluon.jit
def put_planes(stage_s, out_ptr, t, tile, area, on):
    """Rows of shared memory to planes t `[rows]` of a tile."""
    p = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, X))
    gl.store(out_ptr + t.to(gl.int64)[:, None] * area + p[None, :], stage_s.load(X), mask=on)


@gluon.jit
def tiles(
    x_ptr, z_ptr, stats_ptr, sums_ptr, dy_ptr, dx_ptr, d_linear_ptr, d_gate_ptr, n_tokens, padded, stride_i, stride_j, first, last,
    wo_s, wg_s, of_o_s, of_g_s, x_0, x_1, linear_0, linear_1, gate_0, gate_1, EVEN: gl.constexpr,
):  # fmt: skip
    """Every other tile from `first` on, by four warps."""
    rows: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    own: gl.constexpr = gl.SliceLayout(1, OUTPUTS)
    down: gl.constexpr = gl.SliceLayout(1, WHOLE)
    x_l: gl.constexpr = gl.DotOperandLayout(0, HALF, 2)
    d_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    none = gl.full([ROWS, PART], 0.0, gl.float32, HALF)
    # An allocation each: between accesses to one a barrier would be put.
    linear_s, gate_s = (linear_0, linear_1), (gate_0, gate_1)
    area = padded.to(gl.int64) * padded
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    t = gl.arange(0, PART, gl.SliceLayout(0, OUTPUTS))
    n = value_of(gl.arange(0, PART, gl.SliceLayout(1, X)))
    h = gl.arange(0, PART, gl.SliceLayout(1, X))
    line = gl.arange(0, 128, FLAT)
    fetch_x(x_ptr, x_0, first, area, first < last)
    fetch_x(x_ptr, x_1, first + 2, area, first + 2 < last)
    for pair in range(first, last, 4):
        for half in gl.static_range(2):
            tile = pair + 2 * half
            on = tile < last
            # As large as nothing, and unknown before: addresses would be kept, and spilled, through the loop.
            none_yet = tile >> 28
            plane = padded.to(gl.int64) * (padded + 16 * none_yet)
            if EVEN:
                later = (tile * ROWS + 2 * ROWS).to(gl.int64) * WIDTH + line * 64
                ask_for(z_ptr + later, (line >= 0) & (tile + 2 < last))
                ask_for(dy_ptr + later, (line >= 0) & (tile + 2 < last))
            p = tile * ROWS + gl.arange(0, ROWS, rows)
            inside, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
            inside = inside & on
            z = gl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None], other=0.0)
            rstd_x = gl.load(stats_ptr + p, mask=inside, other=0.0)
            shift_x = gl.load(stats_ptr + area + p, mask=inside, other=0.0)
            rstd_z = gl.load(stats_ptr + 2 * area + p, mask=inside, other=0.0)
            shift_z = gl.load(stats_ptr + 3 * area + p, mask=inside, other=0.0)
            of_x, of_z = moments_of(rstd_x, shift_x), moments_of(rstd_z, shift_z)
            z = gl.convert_layout(turned_about(z), x_l)
            async_copy.wait_group(1)
            barrier()
            x = (x_0 if half == 0 else x_1).permute((1, 0)).load(x_l)
            r_x = gl.convert_layout(rstd_x, own, assert_trivial=True)[:, None]
            r_z = gl.convert_layout(rstd_z, own, assert_trivial=True)[:, None]
            cells = gl.convert_layout(cell, own, assert_trivial=True)[:, None] * WIDTH
            seen = gl.convert_layout(inside, own, assert_trivial=True)[:, None]
            second = gl.sum(gl.full([ROWS, PART], 0.0, gl.float32, OUTPUTS), 1)
            dx = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
            for k in gl.static_range(4):
                at = k + none_yet
                linear = warpgroup_mma(x, wo_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
                linear = warpgroup_mma(of_x, of_o_s.index(at).permute((1, 0)), linear, is_async=True)
                gate = warpgroup_mma(z, wg_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
                gate = warpgroup_mma(of_z, of_g_s.index(at).permute((1, 0)), gate, is_async=True)
                dy = gl.load(dy_ptr + cells + (k * PART + t)[None, :], mask=seen, other=0.0).to(gl.float32)
                bias = gl.load(sums_ptr + WIDTH + k * PART + t)
                if k == 0:
                    linear, gate, x, z, of_x, of_z = warpgroup_mma_wait(
                        0, deps=[linear, gate, x, z, of_x, of_z]
                    )
                else:
                    linear, gate, x, z, of_x, of_z, dx, operand = warpgroup_mma_wait(
                        0,
                        deps=[linear, gate, x, z, of_x, of_z, dx, operand],  # noqa: F821
                    )
                linear = gl.convert_layout(in_order(linear), OUTPUTS)
                gate = fast_tanh(gl.convert_layout(in_order(gate), OUTPUTS) * r_z)
                d_linear = dy * (0.5 * r_x)
                d_linear = d_linear * gate + d_linear
                d_gate = d_linear * linear * (0.5 * r_z - gate * (0.5 * r_z))
                second += gl.sum(d_linear * (linear * r_x - bias[None, :]), 1)
                d_linear = in_order(d_linear.to(gl.bfloat16))
                d_gate = in_order(d_gate.to(gl.bfloat16))
                operand = gl.convert_layout(d_linear, d_l)
                dx = warpgroup_mma(operand, wo_s.index(at), dx, use_acc=k > 0, is_async=True)
                # In turns: what the step before put there, every warp has read before it meets the others here.
                linear_s[k % 2].permute((1, 0)).store(gl.convert_layout(d_linear, HALF))
                gate_s[k % 2].permute((1, 0)).store(gl.convert_layout(d_gate, HALF))
                barrier()
                put_planes(linear_s[k % 2], d_linear_ptr, k * PART + n, tile, plane, on)
                put_planes(gate_s[k % 2], d_gate_ptr, k * PART + n, tile, plane, on)
            second = gl.convert_layout(second * (1.0 / WIDTH), down, assert_trivial=True)[:, None]
            scale = gl.convert_layout(rstd_x, down, assert_trivial=True)[:, None]
            shift = gl.convert_layout(shift_x, down, assert_trivial=True)[:, None]
            normal = gl.convert_layout(x, WHOLE).to(gl.float32) * scale + shift
            dx, operand = warpgroup_mma_wait(0, deps=[dx, operand])
            dx = (dx - normal * second).to(gl.bfloat16)
            halves = gl.split(gl.permute(gl.reshape(dx, (ROWS, 2, 64)), (0, 2, 1)))
            low = gl.split(gl.permute(gl.reshape(halves[0], (ROWS, 2, PART)), (0, 2, 1)))
            high = gl.split(gl.permute(gl.reshape(halves[1], (ROWS, 2, PART)), (0, 2, 1)))
            barrier()
            linear_0.permute((1, 0)).store(low[0])
            linear_1.permute((1, 0)).store(low[1])
            gate_0.permute((1, 0)).store(high[0])
            gate_1.permute((1, 0)).store(high[1])
            barrier()
            # Every warp has read the tile of x.
            fetch_x(x_ptr, x_0 if half == 0 else x_1, tile + 4, plane, tile + 4 < last)
            put_planes(linear_0, dx_ptr, h, tile, plane, on)
            put_planes(linear_1, dx_ptr, PART + h, tile, plane, on)
            put_planes(gate_0, dx_ptr, 2 * PART + h, tile, plane, on)
            put_planes(gate_1, dx_ptr, 3 * PART + h, tile, plane, on)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["group"])
def apart_kernel(
    x_ptr, z_ptr, stats_ptr, folded_ptr, sums_partial_ptr, dy_ptr, dx_ptr, d_linear_ptr, d_gate_ptr,
    n_tokens, padded, stride_i, stride_j, group, EVEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `folded_output.backward_kernel` of 128 channels, of `group` tiles of 64 positions; four warps, and four besides."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    wo_s = gl.allocate_shared_memory(gl.bfloat16, [4, PART, WIDTH], wide)
    wg_s = gl.allocate_shared_memory(gl.bfloat16, [4, PART, WIDTH], wide)
    of_o_s = gl.allocate_shared_memory(gl.bfloat16, [4, PART, 16], thin)
    of_g_s = gl.allocate_shared_memory(gl.bfloat16, [4, PART, 16], thin)
    ax_0 = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, ROWS], wide)
    ax_1 = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, ROWS], wide)
    bx_0 = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, ROWS], wide)
    bx_1 = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, ROWS], wide)
    a_0 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    a_1 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    a_2 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    a_3 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    b_0 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    b_1 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    b_2 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    b_3 = gl.allocate_shared_memory(gl.bfloat16, [PART, ROWS], wide)
    sums = sums_partial_ptr + 8 * WIDTH
    place(folded_ptr + 4 * WIDTH * WIDTH, sums, wo_s, of_o_s, False, wl, bl)
    place(folded_ptr + 5 * WIDTH * WIDTH, sums + 2 * WIDTH, wg_s, of_g_s, True, wl, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // ROWS)
    gl.warp_specialize(
        [
            (tiles, (x_ptr, z_ptr, stats_ptr, sums, dy_ptr, dx_ptr, d_linear_ptr, d_gate_ptr, n_tokens, padded, stride_i, stride_j, first, last, wo_s, wg_s, of_o_s, of_g_s, ax_0, ax_1, a_0, a_1, a_2, a_3, EVEN)),
            (tiles, (x_ptr, z_ptr, stats_ptr, sums, dy_ptr, dx_ptr, d_linear_ptr, d_gate_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, wo_s, wg_s, of_o_s, of_g_s, bx_0, bx_1, b_0, b_1, b_2, b_3, EVEN)),
        ],
        [4],
        [240],
    )  # fmt: skip
