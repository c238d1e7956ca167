"""Forward kernel of LayerNorm and linear maps for Hopper, in Gluon, Triton's lower level: what `kernels.forward_kernel` computes.

One program holds all weights in shared memory, where Triton's reads them from the second cache for every tile, and three groups of
four warps take tiles of 64 rows of their own and never wait for each other. What they read and write goes between memory and
registers, where the matrix unit reads the rows of its products: rows and columns of the weights lie in such an order that the
values of a lane are channels one after another (`gluon_parts`).

bf16 weights and results, x in bf16 or fp32, 128 channels and outputs of a map, at most 16 of the narrow one; sm_90.
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
    ROWS,
    WHOLE,
    WIDTH,
    ask_for,
    barrier,
    turned_about,
    value_of,
)
from optimized.ops.names import profiled_as

GROUPS = gl.constexpr(3)
"""Of four warps: as many as 168 registers of a thread leave room for."""
NARROW = gl.constexpr(16)
"""Outputs of the narrow map, as many as a product has at least."""


@gluon.jit
def place_map(w_ptr, into, first, layout: gl.constexpr):
    """128 rows of the weights from `first` on; rows and columns as products have them."""
    j = first + value_of(gl.arange(0, WIDTH, gl.SliceLayout(1, layout)))
    c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
    into.store(gl.load(w_ptr + j[:, None] * WIDTH + c[None, :]))


@gluon.jit
def place_narrow(w_ptr, into, first, HEADS: gl.constexpr, layout: gl.constexpr):
    """The narrow map's rows, from `first` on, and zeros; columns as products have them."""
    k = gl.arange(0, NARROW, gl.SliceLayout(1, layout))
    c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
    cells = w_ptr + (first + k)[:, None] * WIDTH + c[None, :]
    into.store(gl.load(cells, mask=(k < HEADS)[:, None], other=0.0))


@gluon.jit
def start_of(tile, rows):
    """The row with which a tile begins: the last tile ends with the last row, and what it shares with another is computed twice."""
    return gl.minimum(tile * ROWS, rows - ROWS).to(gl.int64)


@gluon.jit
def cells_of_rows():
    """Where the values of a tile are from its first on."""
    r = gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
    return r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))[None, :]


@gluon.jit
def normalised(x, eps):
    """(x - mean) · rstd in fp32, and rstd; two passes."""
    x = x.to(gl.float32)
    x = x - (gl.sum(x, 1) * (1.0 / WIDTH))[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) * (1.0 / WIDTH) + eps)
    return x * rstd[:, None], rstd


@gluon.jit
def forward_tiles(
    x_ptr, gamma_ptr, beta_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, s_ptr, rows, eps, first, last, w_s, head_s,
    HEADS: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Every GROUPS-th tile from `first` on, by four warps."""
    none = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    few = gl.full([ROWS, NARROW], 0.0, gl.float32, BESIDE)
    y_ptrs = (y0_ptr, y1_ptr, y2_ptr, y3_ptr)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    cells = cells_of_rows()
    for tile in range(first, last, GROUPS):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        following = tile + GROUPS
        start = start_of(tile, rows)
        normal, _ = normalised(gl.load(x_ptr + start * WIDTH + cells), eps)
        gamma, beta = gl.load(gamma_ptr + c).to(gl.float32), gl.load(beta_ptr + c).to(gl.float32)
        n = (normal * gamma[None, :] + beta[None, :]).to(gl.bfloat16)
        n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, WHOLE, 2))
        for t in gl.static_range(T):
            y = warpgroup_mma(n, w_s.index(t + none_yet).permute((1, 0)), none, use_acc=False, is_async=True)
            # Not sooner: in the time of a whole tile as much passes through the second cache as it holds.
            if t == T - 1:
                ask_for(x_ptr, following, (following < last) & (following * ROWS + ROWS <= rows))
            y, n = warpgroup_mma_wait(0, deps=[y, n])
            y = gl.convert_layout(turned_about(y.to(gl.bfloat16)), CHANNELS)
            gl.store(y_ptrs[t] + start * WIDTH + cells, y)
            # Or ptxas begins with the next product beside this one's end, for whose sums there are no registers.
            barrier()
        if HEADS > 0:
            s = warpgroup_mma(n, head_s.index(none_yet).permute((1, 0)), few, use_acc=False, is_async=True)
            s, n = warpgroup_mma_wait(0, deps=[s, n])
            q = gl.arange(0, ROWS, gl.SliceLayout(1, BESIDE))
            k = gl.arange(0, NARROW, gl.SliceLayout(0, BESIDE))
            where = s_ptr + start + (k.to(gl.int64)[None, :] * rows + q[:, None])
            gl.store(where, s.to(gl.bfloat16), mask=(k < HEADS)[None, :])


@gluon.jit(repr=profiled_as("layer_norm_linear_forward_hopper"), do_not_specialize=["group"])
def forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, s_ptr, rows, group, eps,
    HEADS: gl.constexpr, T: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """T results `[rows, 128]` and `[HEADS, rows]` of `group` tiles of 64 rows, of which there is one at least.

    Four warps, and eight besides.
    """
    gl.assume(rows > 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    w_s = gl.allocate_shared_memory(gl.bfloat16, [T, WIDTH, WIDTH], wide)
    head_s = gl.allocate_shared_memory(gl.bfloat16, [1, NARROW, WIDTH], wide)
    for t in gl.static_range(T):
        place_map(w_ptr, w_s.index(t), t * WIDTH, wl)
    place_narrow(w_ptr, head_s.index(0), T * WIDTH, HEADS, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + ROWS - 1) // ROWS)
    gl.warp_specialize(
        [
            (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, s_ptr, rows, eps, first, last, w_s, head_s, HEADS, T)),
            (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, s_ptr, rows, eps, first + 1, last, w_s, head_s, HEADS, T)),
            (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, s_ptr, rows, eps, first + 2, last, w_s, head_s, HEADS, T)),
        ],
        [4, 4],
        [168, 168],
    )  # fmt: skip
