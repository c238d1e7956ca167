"""Backward kernel of the end of an update for Hopper in Gluon, Triton's lower level: what `kernels.backward_kernel` computes.

Eight warps take tiles of 64 rows, whose values come by way of two places in shared memory while the tiles before are worked on; what
goes from one product to the other stays there, and so does the weight gradient of all tiles, in registers.

bf16 gates and products, x in bf16 or fp16, the gradient in bf16 or fp32, 128 channels on both sides and 64 rows at least; sm_90.
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

from optimized.ops.gluon_parts import ROWS, WIDTH, barrier, fast_tanh
from optimized.ops.names import profiled_as


@gluon.jit
def fetch(dy_ptr, g_ptr, x_ptr, dy_s, g_s, x_s, tile, slot, rows, layout: gl.constexpr, on):
    """What a tile reads, as one group; the last tile ends with the last row."""
    start = gl.minimum(tile * ROWS, rows - ROWS).to(gl.int64) * WIDTH
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cells = r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(dy_s.index(slot), dy_ptr + start + cells, mask=on)
    async_copy.async_copy_global_to_shared(g_s.index(slot), g_ptr + start + cells, mask=on)
    async_copy.async_copy_global_to_shared(x_s.index(slot), x_ptr + start + cells, mask=on)
    async_copy.commit_group()


@gluon.jit
def put(stage, ptr, start, own, layout: gl.constexpr):
    """A tile of rows, from shared memory to memory; `own`: which rows are the tile's alone."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cells = r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    gl.store(ptr + start * WIDTH + cells, stage.load(layout), mask=(r >= own)[:, None])


@gluon.jit(repr=profiled_as("gated_output_backward_hopper"), do_not_specialize=["rows", "columns", "group"])
def backward_kernel(
    dy_ptr, g_ptr, x_ptr, w_ptr, keep_ptr, dx_ptr, dg_ptr, partial_ptr, rows, columns, keep_row, keep_column, group,
    KEEP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dx and dg `[rows, 128]` of `group` tiles of 64 rows, of which there is one at least, and a share of dW `[128, 128]`."""
    gl.assume(rows > 0)
    gl.assume(columns > 0)
    gl.assume(keep_row >= 0)
    gl.assume(keep_column >= 0)
    gl.assume(group > 0)
    zl: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    sum_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    of_dy: gl.constexpr = gl.NVMMASharedLayout(128, dy_ptr.dtype.element_ty.primitive_bitwidth, 2)
    t = gl.arange(0, WIDTH, gl.SliceLayout(1, zl))
    w = gl.load(w_ptr + t[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, zl))[None, :])
    w_s = gl.allocate_shared_memory(gl.bfloat16, [WIDTH, WIDTH], wide, w)
    dy_s = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [2, ROWS, WIDTH], of_dy)
    g_s = gl.allocate_shared_memory(g_ptr.dtype.element_ty, [2, ROWS, WIDTH], wide)
    x_s = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [2, ROWS, WIDTH], wide)
    du_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    gated_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    dx_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    dg_s = gl.allocate_shared_memory(gl.bfloat16, [ROWS, WIDTH], wide)
    none = gl.full([ROWS, WIDTH], 0.0, gl.float32, acc_l)
    dw = gl.full([WIDTH, WIDTH], 0.0, gl.float32, sum_l)
    r = gl.arange(0, ROWS, gl.SliceLayout(1, zl))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, zl))
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + ROWS - 1) // ROWS)
    fetch(dy_ptr, g_ptr, x_ptr, dy_s, g_s, x_s, first, 0, rows, zl, first < last)
    fetch(dy_ptr, g_ptr, x_ptr, dy_s, g_s, x_s, first + 1, 1, rows, zl, first + 1 < last)
    slot = 0
    for tile in range(first, last):
        start = gl.minimum(tile * ROWS, rows - ROWS)
        # Rows that the tile before has too: their part of the weight gradient is there already.
        own = tile * ROWS - start
        if KEEP:
            p = start + r
            where = (p // columns).to(gl.int64) * keep_row + (p % columns).to(gl.int64) * keep_column
            keep = gl.load(keep_ptr + where[:, None] + c[None, :]).to(gl.float32)
        async_copy.wait_group(1)
        barrier()
        du = dy_s.index(slot).load(zl).to(gl.float32)
        if KEEP:
            du = du * keep
        du_s.store(gl.where((r >= own)[:, None], du, 0.0).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        d = warpgroup_mma(du_s, w_s, none, use_acc=False, is_async=True)
        half = 0.5 * g_s.index(slot).load(acc_l).to(gl.float32)
        s = 0.5 * fast_tanh(half) + 0.5
        gated = s * x_s.index(slot).load(acc_l).to(gl.float32)
        gated_s.store(gated.to(gl.bfloat16))
        d = warpgroup_mma_wait(0, deps=[d])
        dx_s.store((d * s).to(gl.bfloat16))
        dg = d * gated
        dg_s.store((dg - dg * s).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        dw = warpgroup_mma(du_s.permute((1, 0)), gated_s, dw, is_async=True)
        fetch(dy_ptr, g_ptr, x_ptr, dy_s, g_s, x_s, tile + 2, slot, rows, zl, tile + 2 < last)
        put(dx_s, dx_ptr, start.to(gl.int64), own, zl)
        put(dg_s, dg_ptr, start.to(gl.int64), own, zl)
        dw = warpgroup_mma_wait(0, deps=[dw])
        slot = 1 - slot
    async_copy.wait_group(0)
    u = gl.arange(0, WIDTH, gl.SliceLayout(1, sum_l))[:, None]
    h = gl.arange(0, WIDTH, gl.SliceLayout(0, sum_l))[None, :]
    gl.store(partial_ptr + gl.program_id(0).to(gl.int64) * (WIDTH * WIDTH) + u * WIDTH + h, dw)
