"""Gated output for Hopper by groups of warps with the weights in shared memory: see `gated_lab`.

What `kernels.forward_kernel` of `optimized.ops.gated_output` computes, of 128 channels. Each group of four warps takes tiles of 64 rows of its
own, whose gated values the matrix unit reads from registers; what the group's next tile needs is asked for into the second cache.
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

from optimized.ops.gluon_parts import CHANNELS, WHOLE, WIDTH, barrier, fast_tanh, turned_about
from optimized.ops.layer_norm_linear.hopper import place_map
from optimized.ops.triangle_multiplication.hopper import TILE
from optimized.ops.triangle_multiplication.hopper_gradient import (
    FLAT,  # noqa: F401 (`ask_for` has it)
    ask_for,
)


@gluon.jit
def gated_tiles(
    x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first, last, w_s,
    RESIDUAL: gl.constexpr, KEEP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th tile from `first` on, by four warps."""
    none = gl.full([TILE, WIDTH], 0.0, gl.float32, WHOLE)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for tile in range(first, last, GROUPS):
        following = tile + GROUPS
        on = (following < last) & (following * TILE + TILE <= rows)
        ask_for(x_ptr, following, on)
        ask_for(g_ptr, following, on)
        if RESIDUAL:
            ask_for(residual_ptr, following, on)
        p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, CHANNELS))
        inside = (p < rows)[:, None]
        cells = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        g = gl.load(g_ptr + cells, mask=inside, other=0.0).to(gl.float32)
        x = gl.load(x_ptr + cells, mask=inside, other=0.0).to(gl.float32) * 0.5
        gated = (x * fast_tanh(g * 0.5) + x).to(gl.bfloat16)
        gated = gl.convert_layout(turned_about(gated), gl.DotOperandLayout(0, WHOLE, 2))
        # As large as nothing, and unknown before: the weights' addresses would be kept through the loop.
        y = warpgroup_mma(gated, w_s.index(tile >> 28).permute((1, 0)), none, use_acc=False, is_async=True)
        if RESIDUAL:
            residual = gl.load(residual_ptr + cells, mask=inside, other=0.0)
        if KEEP:
            where = (p // columns).to(gl.int64) * keep_row + (p % columns).to(gl.int64) * keep_column
            keep = gl.load(keep_ptr + where[:, None] + c[None, :], mask=inside, other=0.0)
        y, gated = warpgroup_mma_wait(0, deps=[y, gated])
        y = gl.convert_layout(turned_about(y), CHANNELS)
        if KEEP:
            y = y * keep.to(gl.float32)
        if RESIDUAL:
            y = y + residual.to(gl.float32)
        gl.store(out_ptr + cells, y.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["group"])
def forward_kernel(
    x_ptr, g_ptr, w_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, group,
    RESIDUAL: gl.constexpr, KEEP: gl.constexpr, GROUPS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`group` tiles of 64 rows."""
    gl.assume(rows > 0)
    gl.assume(columns > 0)
    gl.assume(keep_row >= 0)
    gl.assume(keep_column >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_s = gl.allocate_shared_memory(gl.bfloat16, [1, WIDTH, WIDTH], wide)
    place_map(w_ptr, w_s.index(0), 0, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + TILE - 1) // TILE)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (gated_tiles, (x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first, last, w_s, RESIDUAL, KEEP, GROUPS)),
                (gated_tiles, (x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first + 1, last, w_s, RESIDUAL, KEEP, GROUPS)),
            ],
            [4],
            [240],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (gated_tiles, (x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first, last, w_s, RESIDUAL, KEEP, GROUPS)),
                (gated_tiles, (x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first + 1, last, w_s, RESIDUAL, KEEP, GROUPS)),
                (gated_tiles, (x_ptr, g_ptr, residual_ptr, keep_ptr, out_ptr, rows, columns, keep_row, keep_column, first + 2, last, w_s, RESIDUAL, KEEP, GROUPS)),
            ],
            [4, 4],
            [168, 168],
        )  # fmt: skip
