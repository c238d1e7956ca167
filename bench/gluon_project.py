"""Triangle multiplication's input projections for Hopper with two groups of four warps that do not wait for each other: see `apart_lab`.

What `optimized.ops.triangle_multiplication.hopper_project` computes; or, GIVEN the statistics, what `folded.project_kernel` does.
Positions are the rows of all products: rows of z come from memory to registers, which the matrix unit reads, a tile ahead, and all
weights lie in shared memory, columns in such an order that a lane's values are eight channels one after another. Results are
turned on their way through shared memory.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from gluon_gradient import CHANNELS, PART, ROWS
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import barrier, fast_tanh
from optimized.ops.triangle_multiplication.hopper import WIDTH
from optimized.ops.triangle_multiplication.hopper_gradient import STEP, place_weights, places, turned_about
from optimized.ops.triangle_multiplication.hopper_project import in_turns

BESIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
"""Of the moments, as the results of a product would be."""
PLANES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def place_beside(sums_ptr, into, first, layout: gl.constexpr):
    """What the moments of a position are multiplied by, 64 rows at a time: `hopper_project.beside_weights`."""
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    for k in gl.static_range(4):
        rows = sums_ptr + first + k * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        biases, sums = gl.load(rows + 4 * WIDTH), gl.load(rows)
        into.index(k).store((in_turns(biases, e, 2) + in_turns(sums, e - 3, 2)).to(gl.bfloat16))


@gluon.jit
def load_z(z_ptr, tile, n_tokens, padded, stride_i, stride_j, c, EVEN: gl.constexpr, on):
    """Rows of z of a tile; outside the real square any row."""
    rows: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    p = tile * ROWS + gl.arange(0, ROWS, rows)
    _, source, _ = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
    return gl.load(z_ptr + source[:, None] + c[None, :], mask=on)


@gluon.jit
def statistics_of(
    z, stats_ptr, mask_ptr, tile, n_tokens, padded, area, eps, MASKED: gl.constexpr, EVEN: gl.constexpr, GIVEN: gl.constexpr
):  # fmt: skip
    """1 / rstd and -mean of the rows, and rstd where a position is kept; they are put to memory, unless they are GIVEN there."""
    rows: gl.constexpr = gl.SliceLayout(1, CHANNELS)
    p = tile * ROWS + gl.arange(0, ROWS, rows)
    inside, _, cell = places(p, n_tokens, padded, 0, 0, EVEN)
    if GIVEN:
        rstd, shift = gl.load(stats_ptr + p), gl.load(stats_ptr + area + p)
        deviation = 1.0 / gl.where(inside, rstd, 1.0)
        return deviation, shift * deviation, gl.load(stats_ptr + 2 * area + p)
    else:
        value = z.to(gl.float32)
        mean = gl.sum(value, 1) * (1.0 / WIDTH)
        off = value - mean[:, None]
        variance = gl.sum(off * off, 1) * (1.0 / WIDTH) + eps
        rstd = gl.rsqrt(variance)
        deviation = variance * rstd
        keep = inside
        if MASKED:
            keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
        kept = gl.where(keep, rstd, 0.0)
        gl.store(stats_ptr + p, gl.where(inside, rstd, 0.0))
        gl.store(stats_ptr + area + p, gl.where(inside, -mean * rstd, 0.0))
        gl.store(stats_ptr + 2 * area + p, kept)
        return deviation, -mean, kept


@gluon.jit
def tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps,
    linear_s, gate_s, of_linear_s, of_gate_s, stage_0, stage_1,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """a and b of every other tile from `first` on, by four warps."""
    z_l: gl.constexpr = gl.DotOperandLayout(0, PART, 2)
    none = gl.full([ROWS, STEP], 0.0, gl.float32, PART)
    stage_s = (stage_0, stage_1)
    area = padded.to(gl.int64) * padded
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    t = gl.arange(0, STEP, gl.SliceLayout(1, PLANES))
    z = load_z(z_ptr, first, n_tokens, padded, stride_i, stride_j, c, EVEN, first < last)
    for tile in range(first, last, 2):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        deviation, less_mean, rstd = statistics_of(
            z, stats_ptr, mask_ptr, tile, n_tokens, padded, area, eps, MASKED, EVEN, GIVEN
        )
        beside: gl.constexpr = gl.SliceLayout(1, BESIDE)
        deviation = gl.convert_layout(deviation, beside, assert_trivial=True)
        less_mean = gl.convert_layout(less_mean, beside, assert_trivial=True)
        moments = (in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16)
        moments = gl.convert_layout(moments, z_l)
        operand = gl.convert_layout(turned_about(z), z_l)
        z = load_z(z_ptr, tile + 2, n_tokens, padded, stride_i, stride_j, c, EVEN, tile + 2 < last)
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, PART), assert_trivial=True)[:, None]
        for k in gl.static_range(4):
            at = k + none_yet
            linear = warpgroup_mma(
                operand, linear_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            linear = warpgroup_mma(moments, of_linear_s.index(at).permute((1, 0)), linear, is_async=True)
            gate = warpgroup_mma(
                operand, gate_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            gate = warpgroup_mma(moments, of_gate_s.index(at).permute((1, 0)), gate, is_async=True)
            linear, gate, operand, moments = warpgroup_mma_wait(0, deps=[linear, gate, operand, moments])
            linear = linear * rstd
            value = (linear * fast_tanh(gate * rstd) + linear).to(gl.bfloat16)
            # In turns: what the step before put there, every warp has read before it meets the others here.
            stage_s[k % 2].permute((1, 0)).store(value)
            barrier()
            p = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, PLANES))
            into = out_ptr + (k * STEP + t).to(gl.int64)[:, None] * area + p[None, :]
            gl.store(into, stage_s[k % 2].load(PLANES))


@gluon.jit(do_not_specialize=["group"])
def apart_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `hopper_project.project_kernel`; four warps, and four besides. stats `[3, P, P]`: of z; written, or GIVEN."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    linear_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    gate_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    of_linear_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, 16], thin)
    of_gate_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, 16], thin)
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    place_weights(folded_ptr, linear_s, 0, wl)
    place_weights(folded_ptr, gate_s, 2 * WIDTH, wl)
    place_beside(sums_partial_ptr, of_linear_s, 0, bl)
    place_beside(sums_partial_ptr, of_gate_s, 2 * WIDTH, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // ROWS)
    gl.warp_specialize(
        [
            (tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, linear_s, gate_s, of_linear_s, of_gate_s, a0, a1, EVEN, MASKED, GIVEN)),
            (tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, linear_s, gate_s, of_linear_s, of_gate_s, b0, b1, EVEN, MASKED, GIVEN)),
        ],
        [4],
        [240],
    )  # fmt: skip
