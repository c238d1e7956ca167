"""Forward kernel of triangle multiplication's input projections for Hopper: see `hopper`.

Rows of z come from memory to registers, where the matrix unit reads them and where their statistics are taken, a tile ahead; all
weights lie in shared memory. As in `folded.project_kernel` the correction for the mean and β is a product too, with the moments of
each position. Results, of which a lane has two channels after another, are turned on their way through shared memory: they
lie channel by channel.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import BESIDE, CHANNELS, WIDTH, barrier, fast_tanh, place_weights, turned_about
from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.hopper import PART, STEP, TILE, places

PLANES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Of results on their way to memory."""


@gluon.jit
def in_turns(x, e, LOW: gl.constexpr):
    """`[rows, 16]` in fp32: of columns e = 0, 1 and 2 column LOW is what rounding to bf16 leaves of x, the others x rounded."""
    high = x.to(gl.bfloat16).to(gl.float32)
    value = gl.where((e == LOW)[None, :], (x - high)[:, None], high[:, None])
    return gl.where(((e >= 0) & (e < 3))[None, :], value, 0.0)


@gluon.jit
def place_beside(sums_ptr, into, first, layout: gl.constexpr):
    """In bf16, what the moments of a position are multiplied by, from Σw' and β·w of 256 rows from `first` on, 64 at a time.

    Both in two parts, as the moments are: the product of their low parts is left out.
    """
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    parts: gl.constexpr = into.shape[0]
    for k in gl.static_range(parts):
        rows = sums_ptr + first + k * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        biases, sums = gl.load(rows + 4 * WIDTH), gl.load(rows)
        into.index(k).store((in_turns(biases, e, 2) + in_turns(sums, e - 3, 2)).to(gl.bfloat16))


@gluon.jit
def load_tile(z_ptr, mask_ptr, tile, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr, MASKED: gl.constexpr, on):  # fmt: skip
    """Rows of z of a tile, outside the real square any row, and what the mask says of them."""
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, CHANNELS))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    _, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
    z = gl.load(z_ptr + source[:, None] + c[None, :], mask=on)
    return z, gl.load(mask_ptr + cell, mask=on, other=0).to(gl.int1) if MASKED else on


@gluon.jit
def take(z, kept, stats_ptr, tile, n_tokens, padded, eps, EVEN: gl.constexpr):
    """1 / rstd and -mean of the rows of a tile, and rstd, zero where a position is left out. The statistics go to memory.

    Two passes in fp32.
    """
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, CHANNELS))
    inside, _, _ = places(p, n_tokens, padded, 0, 0, EVEN)
    area = padded.to(gl.int64) * padded
    value = z.to(gl.float32)
    mean = gl.sum(value, 1) * (1.0 / WIDTH)
    off = value - mean[:, None]
    variance = gl.sum(off * off, 1) * (1.0 / WIDTH) + eps
    rstd = gl.rsqrt(variance)
    of_kept = gl.where(inside & kept, rstd, 0.0)
    gl.store(stats_ptr + p, gl.where(inside, rstd, 0.0))
    gl.store(stats_ptr + area + p, gl.where(inside, -mean * rstd, 0.0))
    gl.store(stats_ptr + 2 * area + p, of_kept)
    return variance * rstd, -mean, of_kept


@gluon.jit
def project_tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps,
    linear_s, gate_s, of_linear_s, of_gate_s, stage_0, stage_1, EVEN: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """a and b of every other tile from `first` on, by four warps."""
    z_l: gl.constexpr = gl.DotOperandLayout(0, PART, 2)
    beside: gl.constexpr = gl.SliceLayout(1, BESIDE)
    none = gl.full([TILE, STEP], 0.0, gl.float32, PART)
    stage_s = (stage_0, stage_1)
    area = padded.to(gl.int64) * padded
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    t = gl.arange(0, STEP, gl.SliceLayout(1, PLANES))
    z, kept = load_tile(z_ptr, mask_ptr, first, n_tokens, padded, stride_i, stride_j, EVEN, MASKED, first < last)  # fmt: skip
    for tile in range(first, last, 2):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        deviation, less_mean, rstd = take(z, kept, stats_ptr, tile, n_tokens, padded, eps, EVEN)
        deviation = gl.convert_layout(deviation, beside, assert_trivial=True)
        less_mean = gl.convert_layout(less_mean, beside, assert_trivial=True)
        moments = (in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16)
        moments = gl.convert_layout(moments, z_l)
        operand = gl.convert_layout(turned_about(z), z_l)
        z, kept = load_tile(z_ptr, mask_ptr, tile + 2, n_tokens, padded, stride_i, stride_j, EVEN, MASKED, tile + 2 < last)  # fmt: skip
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
            p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, PLANES))
            into = out_ptr + (k * STEP + t).to(gl.int64)[:, None] * area + p[None, :]
            gl.store(into, stage_s[k % 2].load(PLANES))


@gluon.jit(repr=profiled_as("triangle_multiplication_project_hopper"), do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """a and b, `[256, P, P]`, and the statistics `[3, P, P]` of z, of `group` tiles of 64 positions; four warps, and four besides.

    Tiles are whole, since P is a multiple of 16. EVEN: N is P and z contiguous.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    # Linear parts of a and b, and their gates.
    linear_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    gate_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    of_linear_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, 16], thin)
    of_gate_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, 16], thin)
    # An allocation each: between accesses to one a barrier would be put.
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    place_weights(folded_ptr, linear_s, 0, wl)
    place_weights(folded_ptr, gate_s, 2 * WIDTH, wl)
    place_beside(sums_partial_ptr, of_linear_s, 0, bl)
    place_beside(sums_partial_ptr, of_gate_s, 2 * WIDTH, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    gl.warp_specialize(
        [
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, linear_s, gate_s, of_linear_s, of_gate_s, a0, a1, EVEN, MASKED)),
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, linear_s, gate_s, of_linear_s, of_gate_s, b0, b1, EVEN, MASKED)),
        ],
        [4],
        [240],
    )  # fmt: skip
