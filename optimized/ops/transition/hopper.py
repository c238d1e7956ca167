"""Forward kernel of the transition for Hopper in Gluon, Triton's lower level: what `kernels.forward_kernel` computes.

Weights are in the ring of `hopper_ring`; the matrix unit reads LN(x) and the hidden units from registers.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import (
    CHANNELS,
    HALF,
    PART,
    ROWS,
    WHOLE,
    WIDTH,
    ask_for,
    fast_tanh,
    in_halves,
    turned_about,
)
from optimized.ops.names import profiled_as
from optimized.ops.transition.hopper_ring import UNITS, bring, half_normal, load_rows, make_ring, statistics


@gluon.jit
def through_hidden(n, pair_s, out_s, full_s, empty_s, turns, STAGES: gl.constexpr):
    """Half of the update of a tile."""
    none = gl.full([ROWS, 2 * UNITS], 0.0, gl.float32, PART)
    y = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    for turn in range(turns):
        none_yet = turn >> 28
        for at in gl.static_range(STAGES):
            mbarrier.wait(full_s.index(at), turn & 1)
            fence_async_shared()
            pair = pair_s.index(at + none_yet)
            both = warpgroup_mma(n, pair.permute((1, 0)), none, use_acc=False, is_async=True)
            if at == 0:
                both = warpgroup_mma_wait(0, deps=[both])
            else:
                both, y, h = warpgroup_mma_wait(0, deps=[both, y, h])  # noqa: F821
                mbarrier.arrive(empty_s.index(at - 1), count=1)
            a, b = in_halves(both, HALF)
            h = ((a * fast_tanh(a) + a) * b).to(gl.bfloat16)
            h = gl.convert_layout(h, gl.DotOperandLayout(0, WHOLE, 2))
            y = warpgroup_mma(h, out_s.index(at + none_yet), y, is_async=True)
        y, h = warpgroup_mma_wait(0, deps=[y, h])
        mbarrier.arrive(empty_s.index(STAGES - 1), count=1)
    return y


@gluon.jit
def forward_tiles(
    x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, own: gl.constexpr,
    pair_s, out_s, full_s, empty_s, STAGES: gl.constexpr, ADDED: gl.constexpr,
):  # fmt: skip
    """The update of one tile of each pair, or x and that, by four warps."""
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for both in range(first, last):
        tile = 2 * both + own
        p = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside = (p < rows)[:, None]
        cells = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        x = load_rows(x_ptr, cells, inside)
        following = tile + 2
        ask_for(x_ptr, following, (both + 1 < last) & (following * ROWS + ROWS <= rows))
        mean, rstd = statistics(x, eps)
        n = half_normal(x, gamma_ptr, beta_ptr, mean, rstd)
        y = through_hidden(n, pair_s, out_s, full_s, empty_s, turns, STAGES)
        y = gl.convert_layout(turned_about(y), CHANNELS) * 2.0
        if ADDED:
            # x is read again (from L2): keeping the tile would cost its registers through the products.
            y += load_rows(x_ptr, cells, inside)
        gl.store(out_ptr + cells, y.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit(repr=profiled_as("transition_forward_hopper"), do_not_specialize=["group"])
def forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, out_ptr, rows, group, turns, eps,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, ADDED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """y `[rows, 128]`, or x and that, of `group` pairs of tiles of 64 rows. Four warps, five besides.

    `turns`: CHUNKS / STAGES, an even number.
    """
    gl.assume(rows > 0)
    gl.assume(group > 0)
    pair_s, out_s, full_s, empty_s = make_ring(STAGES)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + 2 * ROWS - 1) // (2 * ROWS))
    steps = gl.maximum(last - first, 0) * CHUNKS
    gl.warp_specialize(
        [
            (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 0, pair_s, out_s, full_s, empty_s, STAGES, ADDED)),
            (forward_tiles, (x_ptr, gamma_ptr, beta_ptr, out_ptr, rows, eps, first, last, turns, 1, pair_s, out_s, full_s, empty_s, STAGES, ADDED)),
            (bring, (w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
