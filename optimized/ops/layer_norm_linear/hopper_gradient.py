"""Input gradient of LayerNorm and four linear maps for Hopper, in Gluon: what `kernels.input_gradient_kernel` computes.

One program holds all folded weights in shared memory, where Triton's reads them from the second cache for every tile. Two groups of
four warps take tiles of 64 rows of their own. The gradients of a tile, one map's after another, a warp for each group brings to two places
in shared memory, where the matrix unit reads them as they lie; x and its other gradient go from memory to registers and stay there.

bf16 weights and gradients, x in bf16 or fp32, 128 channels and outputs of a map, at most 16 of the narrow one; sm_90.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import (
    BESIDE,
    CHANNELS,
    ROWS,
    WHOLE,
    WIDTH,
    ask_for,
    barrier,
    place_rows,
    turned_about,
)
from optimized.ops.layer_norm_linear.hopper import NARROW, cells_of_rows, normalised, place_narrow, start_of
from optimized.ops.names import profiled_as


@gluon.jit
def bring(
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, rows, first, last, place_0, place_1, full_0, full_1, empty_0, empty_1
):
    """By one warp: the gradients of every other tile from `first` on, map after map, as soon as there is a place for them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0])
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cells = r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    dy_ptrs = (dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr)
    places, full, empty = (place_0, place_1), (full_0, full_1), (empty_0, empty_1)
    for tile in range(first, last, 2):
        start = start_of(tile, rows) * WIDTH
        for t in gl.static_range(4):
            # Each place is used twice a tile.
            mbarrier.wait(empty[t % 2], 1 - t // 2)
            async_copy.async_copy_global_to_shared(places[t % 2], dy_ptrs[t] + start + cells)
            async_copy.mbarrier_arrive(full[t % 2], increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def gradient_tiles(
    x_ptr, ds_ptr, dx_ptr, normal_ptr, more_ptr, rows, eps, first, last, w_s, head_s, place_0, place_1, full_0, full_1, empty_0, empty_1,
    HEADS: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Every other tile from `first` on, by four warps."""
    none = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    places, full, empty = (place_0, place_1), (full_0, full_1), (empty_0, empty_1)
    cells = cells_of_rows()
    for tile in range(first, last, 2):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        following = tile + 2
        start = start_of(tile, rows)
        normal, rstd = normalised(gl.load(x_ptr + start * WIDTH + cells), eps)
        gl.store(normal_ptr + start * WIDTH + cells, normal.to(gl.bfloat16))
        dn = none
        if HEADS > 0:
            q = start + gl.arange(0, ROWS, gl.SliceLayout(1, BESIDE))
            k = gl.arange(0, NARROW, gl.SliceLayout(0, BESIDE))
            ds = gl.load(
                ds_ptr + k.to(gl.int64)[None, :] * rows + q[:, None], mask=(k < HEADS)[None, :], other=0.0
            )
            ds = gl.convert_layout(ds.to(gl.bfloat16), gl.DotOperandLayout(0, WHOLE, 2))
            dn = warpgroup_mma(ds, head_s.index(none_yet), dn, use_acc=False, is_async=True)
        for t in gl.static_range(4):
            mbarrier.wait(full[t % 2], t // 2)
            fence_async_shared()
            dn = warpgroup_mma(
                places[t % 2], w_s.index(t + none_yet), dn, use_acc=HEADS > 0 or t > 0, is_async=True
            )
            if MORE and t == 0:
                more = gl.load(more_ptr + start * WIDTH + cells)
            # Not sooner: in the time of a whole tile as much passes through the second cache as it holds.
            if t == 3:
                ask_for(x_ptr, following, (following < last) & (following * ROWS + ROWS <= rows))
            dn = warpgroup_mma_wait(0, deps=[dn])
            mbarrier.arrive(empty[t % 2], count=1)
        dn = gl.convert_layout(turned_about(dn), CHANNELS)
        slope = gl.sum(dn * normal, 1) * (1.0 / WIDTH)
        dx = (dn - normal * slope[:, None]) * rstd[:, None]
        if MORE:
            dx += more.to(gl.float32)
        gl.store(dx_ptr + start * WIDTH + cells, dx.to(dx_ptr.dtype.element_ty))


@gluon.jit(repr=profiled_as("layer_norm_linear_input_gradient_hopper"), do_not_specialize=["group"])
def input_gradient_kernel(
    x_ptr, folded_ptr, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, ds_ptr, dx_ptr, normal_ptr, more_ptr, rows, group, eps,
    HEADS: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dx and x̂ `[rows, 128]` of `group` tiles of 64 rows, of which there is one at least. Four warps, and six besides.

    MORE: another gradient of x is added to dx.
    """
    gl.assume(rows > 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_s = gl.allocate_shared_memory(gl.bfloat16, [4, WIDTH, WIDTH], wide)
    head_s = gl.allocate_shared_memory(gl.bfloat16, [1, NARROW, WIDTH], wide)
    # An allocation each: between accesses to one a barrier would be put.
    a0 = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    full_a0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_a1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_b0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_b1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty_a0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty_a1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty_b0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty_b1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full_a0, count=32)
    mbarrier.init(full_a1, count=32)
    mbarrier.init(full_b0, count=32)
    mbarrier.init(full_b1, count=32)
    mbarrier.init(empty_a0, count=1)
    mbarrier.init(empty_a1, count=1)
    mbarrier.init(empty_b0, count=1)
    mbarrier.init(empty_b1, count=1)
    place_rows(folded_ptr, 0, w_s, wl)
    place_narrow(folded_ptr, head_s.index(0), 4 * WIDTH, HEADS, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + ROWS - 1) // ROWS)
    gl.warp_specialize(
        [
            (gradient_tiles, (x_ptr, ds_ptr, dx_ptr, normal_ptr, more_ptr, rows, eps, first, last, w_s, head_s, a0, a1, full_a0, full_a1, empty_a0, empty_a1, HEADS, MORE)),
            (gradient_tiles, (x_ptr, ds_ptr, dx_ptr, normal_ptr, more_ptr, rows, eps, first + 1, last, w_s, head_s, b0, b1, full_b0, full_b1, empty_b0, empty_b1, HEADS, MORE)),
            (bring, (dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, rows, first, last, a0, a1, full_a0, full_a1, empty_a0, empty_a1)),
            (bring, (dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, rows, first + 1, last, b0, b1, full_b0, full_b1, empty_b0, empty_b1)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
