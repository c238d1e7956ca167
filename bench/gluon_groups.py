"""Triangle multiplication's input projections for Hopper by more groups of warps: see `groups_lab`.

What `hopper_project` of `optimized.ops.triangle_multiplication` computes, by two to four groups of four warps, 64 or 32 channels at a
time, and with rows of z in registers a tile ahead or asked for into the second cache.
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

from optimized.ops.gluon_parts import BESIDE, WIDTH, barrier, fast_tanh, turned_about
from optimized.ops.triangle_multiplication.hopper import TILE, in_halves, place_both
from optimized.ops.triangle_multiplication.hopper_gradient import (
    FLAT,  # noqa: F401 (`ask_for` has it)
    ask_for,
)
from optimized.ops.triangle_multiplication.hopper_project import (
    PLANES,  # noqa: F401 (`put` has it)
    load_pairs,
    place_biases,
    put,
    standardised,
)


@gluon.jit
def project_tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, stage_0, stage_1,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, STEP: gl.constexpr, GROUPS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """As there, every GROUPS-th tile."""
    both_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * STEP, 16])
    half_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, STEP, 16])
    z_l: gl.constexpr = gl.DotOperandLayout(0, both_l, 2)
    steps: gl.constexpr = 2 * WIDTH // STEP
    none = gl.full([TILE, 2 * STEP], 0.0, gl.float32, both_l)
    stage_s = (stage_0, stage_1)
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    if AHEAD:
        z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, first, n_tokens, padded, stride_i, stride_j, first < last, EVEN, MASKED, GIVEN)  # fmt: skip
    for tile in range(first, last, GROUPS):
        none_yet = tile >> 28
        following = tile + GROUPS
        if not AHEAD:
            z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, tile, n_tokens, padded, stride_i, stride_j, tile < last, EVEN, MASKED, GIVEN)  # fmt: skip
            if EVEN:
                ask_for(z_ptr, following, following < last)
        n, keep = standardised(z, kept, shift, stats_ptr, tile, n_tokens, padded, eps, EVEN, GIVEN)
        operand = gl.convert_layout(turned_about(n), z_l)
        keep = gl.convert_layout(keep, gl.SliceLayout(1, BESIDE), assert_trivial=True)
        ones = gl.where((e < 2)[None, :] & keep[:, None], 1.0, 0.0).to(gl.bfloat16)
        ones = gl.convert_layout(ones, z_l)
        if AHEAD:
            z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, following, n_tokens, padded, stride_i, stride_j, following < last, EVEN, MASKED, GIVEN)  # fmt: skip
        for k in gl.static_range(steps):
            at = k + none_yet
            both = warpgroup_mma(
                operand, both_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            both = warpgroup_mma(ones, of_both_s.index(at).permute((1, 0)), both, is_async=True)
            barrier()
            if k == 0:
                put(stage_s[1], out_ptr, tile - GROUPS, steps - 1, padded, tile > first)
            else:
                put(stage_s[(k - 1) % 2], out_ptr, tile, k - 1, padded, tile >= 0)
            both, operand, ones = warpgroup_mma_wait(0, deps=[both, operand, ones])
            linear, gate = in_halves(both, half_l)
            value = (linear * fast_tanh(gate) + linear).to(gl.bfloat16)
            stage_s[k % 2].permute((1, 0)).store(value)
    barrier()
    put(stage_s[1], out_ptr, first + (last - 1 - first) // GROUPS * GROUPS, steps - 1, padded, first < last)


@gluon.jit(do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr,
    STEP: gl.constexpr, GROUPS: gl.constexpr, AHEAD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As there."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    both_s = gl.allocate_shared_memory(gl.bfloat16, [2 * WIDTH // STEP, 2 * STEP, WIDTH], wide)
    of_both_s = gl.allocate_shared_memory(gl.bfloat16, [2 * WIDTH // STEP, 2 * STEP, 16], thin)
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    place_both(folded_ptr, both_s, wl)
    place_biases(sums_partial_ptr, of_both_s, bl)
    fence_async_shared()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    if GROUPS == 2:
        barrier()
        gl.warp_specialize(
            [
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
            ],
            [4],
            [240],
        )  # fmt: skip
    elif GROUPS == 3:
        c0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        c1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        barrier()
        gl.warp_specialize(
            [
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 2, last, eps, both_s, of_both_s, c0, c1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
            ],
            [4, 4],
            [168, 168],
        )  # fmt: skip
    else:
        c0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        c1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        d0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        d1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
        barrier()
        gl.warp_specialize(
            [
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 2, last, eps, both_s, of_both_s, c0, c1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
                (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 3, last, eps, both_s, of_both_s, d0, d1, EVEN, MASKED, GIVEN, STEP, GROUPS, AHEAD)),
            ],
            [4, 4, 4],
            [128, 128, 128],
        )  # fmt: skip
