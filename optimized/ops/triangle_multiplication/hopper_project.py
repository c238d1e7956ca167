"""Kernel of triangle multiplication's input projections for Hopper: see `hopper`.

Rows of z come from memory to registers a tile ahead. There their statistics are taken, and they are standardised: as rounded as the
definition's LN(z), of which γ is in the folded weights and β a product with ones. The matrix unit reads them in registers, and all
weights in shared memory; linear parts and gates of 64 channels are halves of one product's columns. Results, of which a lane has two
channels after another, are turned on their way through shared memory, where they wait until the next product is asked for: they
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

from optimized.ops.gluon_parts import (
    BESIDE,
    CHANNELS,
    PART,
    WHOLE,
    WIDTH,
    barrier,
    fast_tanh,
    in_halves,
    turned_about,
)
from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.hopper import STEP, TILE, place_both, places

PLANES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Of results on their way to memory."""
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [0, 32], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
"""Of rows in CHANNELS, as pairs of channels in 32 bits."""


@gluon.jit
def place_biases(sums_ptr, into, layout: gl.constexpr):
    """In bf16 what rounding leaves of β · w beside it, in the order of `place_both`."""
    parts: gl.constexpr = into.shape[0]
    step: gl.constexpr = into.shape[1] // 2
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    for k in gl.static_range(parts):
        r = gl.arange(0, 2 * step, gl.SliceLayout(1, layout))
        bias = gl.load(sums_ptr + r // step * (2 * WIDTH) + k * step + r % step + 4 * WIDTH)
        high = bias.to(gl.bfloat16).to(gl.float32)
        value = gl.where((e == 1)[None, :], (bias - high)[:, None], high[:, None])
        into.index(k).store(gl.where((e < 2)[None, :], value, 0.0).to(gl.bfloat16))


@gluon.jit
def load_pairs(
    z_ptr, mask_ptr, stats_ptr, tile, n_tokens, padded, stride_i, stride_j, on,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """Rows of z of a tile, pairs of channels in 32 bits, outside the real square any row, and what the mask says of them.

    GIVEN: rstd, zero where a position is left out, and shift instead of what the mask says, twice.
    """
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, PAIRS))
    c = gl.arange(0, WIDTH // 2, gl.SliceLayout(0, PAIRS))
    _, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
    rows = z_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (source // 2)[:, None]
    z = gl.load(rows + c[None, :], mask=on)
    if GIVEN:
        area = padded.to(gl.int64) * padded
        kept = gl.load(stats_ptr + 2 * area + p, mask=on, other=0.0)
        shift = gl.load(stats_ptr + area + p, mask=on, other=0.0)
    else:
        kept = gl.load(mask_ptr + cell, mask=on, other=0).to(gl.int1) if MASKED else on
        shift = kept
    return z, kept, shift


@gluon.jit
def standardised(z, kept, shift, stats_ptr, tile, n_tokens, padded, eps, EVEN: gl.constexpr, GIVEN: gl.constexpr):  # fmt: skip
    """(z - mean) · rstd of a tile in bf16, zero where a position is left out, and which are not.

    By statistics that are given; or else they go to memory.
    """
    left = (z << 16).to(gl.float32, bitcast=True)
    right = (z & -65536).to(gl.float32, bitcast=True)
    if GIVEN:
        keep = kept != 0
        shift = gl.where(keep, shift, 0.0)[:, None]
        left, right = left * kept[:, None] + shift, right * kept[:, None] + shift
    else:
        p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, PAIRS))
        area = padded.to(gl.int64) * padded
        inside, _, _ = places(p, n_tokens, padded, 0, 0, EVEN)
        keep = inside & kept
        mean = gl.sum(left + right, 1) * (1.0 / WIDTH)
        left, right = left - mean[:, None], right - mean[:, None]
        # Each by itself, so that squares are summed as they are multiplied.
        squares = gl.sum(left * left, 1) + gl.sum(right * right, 1)
        rstd = gl.rsqrt(squares * (1.0 / WIDTH) + eps)
        of_kept = gl.where(keep, rstd, 0.0)
        gl.store(stats_ptr + p, gl.where(inside, rstd, 0.0))
        gl.store(stats_ptr + area + p, gl.where(inside, -mean * rstd, 0.0))
        gl.store(stats_ptr + 2 * area + p, of_kept)
        left, right = left * of_kept[:, None], right * of_kept[:, None]
    n = gl.reshape(gl.join(left, right), (TILE, WIDTH))
    return gl.convert_layout(n, CHANNELS, assert_trivial=True).to(gl.bfloat16), keep


@gluon.jit
def put(stage, out_ptr, tile, k, padded, on):
    """The k-th channels of a tile, as many as `stage` has, from shared memory to a and b."""
    channels: gl.constexpr = stage.shape[0]
    t = gl.arange(0, channels, gl.SliceLayout(1, PLANES))
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, PLANES))
    into = out_ptr + (k * channels + t).to(gl.int64)[:, None] * (padded.to(gl.int64) * padded) + p[None, :]
    gl.store(into, stage.load(PLANES), mask=on)


@gluon.jit
def project_tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, stage_0, stage_1,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """a and b of every other tile from `first` on, by four warps."""
    z_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    none = gl.full([TILE, 2 * STEP], 0.0, gl.float32, WHOLE)
    stage_s = (stage_0, stage_1)
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, first, n_tokens, padded, stride_i, stride_j, first < last, EVEN, MASKED, GIVEN)  # fmt: skip
    for tile in range(first, last, 2):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        n, keep = standardised(z, kept, shift, stats_ptr, tile, n_tokens, padded, eps, EVEN, GIVEN)
        operand = gl.convert_layout(turned_about(n), z_l)
        keep = gl.convert_layout(keep, gl.SliceLayout(1, BESIDE), assert_trivial=True)
        ones = gl.where((e < 2)[None, :] & keep[:, None], 1.0, 0.0).to(gl.bfloat16)
        ones = gl.convert_layout(ones, z_l)
        z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, tile + 2, n_tokens, padded, stride_i, stride_j, tile + 2 < last, EVEN, MASKED, GIVEN)  # fmt: skip
        for k in gl.static_range(4):
            at = k + none_yet
            both = warpgroup_mma(
                operand, both_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            both = warpgroup_mma(ones, of_both_s.index(at).permute((1, 0)), both, is_async=True)
            # What the step before put there; the step before that, every warp has read before it meets the others here.
            barrier()
            if k == 0:
                put(stage_s[1], out_ptr, tile - 2, 3, padded, tile > first)
            else:
                put(stage_s[(k - 1) % 2], out_ptr, tile, k - 1, padded, tile >= 0)
            both, operand, ones = warpgroup_mma_wait(0, deps=[both, operand, ones])
            linear, gate = in_halves(both, PART)
            value = (linear * fast_tanh(gate) + linear).to(gl.bfloat16)
            stage_s[k % 2].permute((1, 0)).store(value)
    barrier()
    put(stage_s[1], out_ptr, first + (last - 1 - first) // 2 * 2, 3, padded, first < last)


@gluon.jit(repr=profiled_as("triangle_multiplication_project_hopper"), do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """a and b, `[256, P, P]`, of `group` tiles of 64 positions; four warps, and four besides.

    The statistics `[3, P, P]` of z are put into `stats`, or, GIVEN, read there, the mask's effect among them. Tiles are whole,
    since P is a multiple of 16. EVEN: N is P and z contiguous.
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
    both_s = gl.allocate_shared_memory(gl.bfloat16, [4, 2 * STEP, WIDTH], wide)
    of_both_s = gl.allocate_shared_memory(gl.bfloat16, [4, 2 * STEP, 16], thin)
    # An allocation each: between accesses to one a barrier would be put.
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    place_both(folded_ptr, both_s, wl)
    place_biases(sums_partial_ptr, of_both_s, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    gl.warp_specialize(
        [
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, EVEN, MASKED, GIVEN)),
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, EVEN, MASKED, GIVEN)),
        ],
        [4],
        [240],
    )  # fmt: skip
