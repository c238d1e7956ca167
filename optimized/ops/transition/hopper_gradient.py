"""Input gradient of the transition for Hopper in Gluon, Triton's lower level: what `kernels.input_gradient_kernel` computes.

Weights are in the ring of `hopper_ring`. The matrix unit reads LN(x) and dy from registers, and what the first products leave there
is the last one's operand. dy in bf16.
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
    barrier,
    fast_tanh,
    in_halves,
    sums_of_lanes,
    turned_about,
)
from optimized.ops.names import profiled_as
from optimized.ops.transition.hopper_ring import UNITS, bring, half_normal, load_rows, make_ring, statistics


@gluon.jit
def differentiated(a, b, dh):
    """Gradients of a and b, of which halves are given, from that of swish(a) · b, as operands of the next product."""
    d_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    t = fast_tanh(a)
    swish = a * t + a
    da = dh * b * ((swish - swish * t) + (1.0 + t))
    return gl.convert_layout(da.to(gl.bfloat16), d_l), gl.convert_layout((dh * swish).to(gl.bfloat16), d_l)


@gluon.jit
def through_hidden(n, dy, pair_s, out_s, full_s, empty_s, turns, STAGES: gl.constexpr):
    """The gradient to LN(x) of a tile. Its steps go round the ring an even number of times: places and phases are known."""
    none = gl.full([ROWS, 2 * UNITS], 0.0, gl.float32, PART)
    none_h = gl.full([ROWS, UNITS], 0.0, gl.float32, HALF)
    dn = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    dy = gl.convert_layout(turned_about(dy), gl.DotOperandLayout(0, HALF, 2))
    for turn in range(turns):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = turn >> 28
        for at in gl.static_range(STAGES):
            mbarrier.wait(full_s.index(at), turn & 1)
            fence_async_shared()
            pair = pair_s.index(at + none_yet)
            both = warpgroup_mma(n, pair.permute((1, 0)), none, use_acc=False, is_async=True)
            dh = warpgroup_mma(
                dy, out_s.index(at + none_yet).permute((1, 0)), none_h, use_acc=False, is_async=True
            )
            if at == 0:
                both, dh = warpgroup_mma_wait(0, deps=[both, dh])
            else:  # the products of the step before, whose weights are spent
                both, dh, dn, da, db = warpgroup_mma_wait(0, deps=[both, dh, dn, da, db])  # noqa: F821
                mbarrier.arrive(empty_s.index(at - 1), count=1)
            a, b = in_halves(both, HALF)
            da, db = differentiated(a, b, dh)
            dn = warpgroup_mma(da, pair.slice(0, UNITS, 0), dn, is_async=True)
            dn = warpgroup_mma(db, pair.slice(UNITS, UNITS, 0), dn, is_async=True)
        # Products that are on their way at the end of a turn, ptxas would run one after another.
        dn, da, db = warpgroup_mma_wait(0, deps=[dn, da, db])
        mbarrier.arrive(empty_s.index(STAGES - 1), count=1)
    return dn


@gluon.jit
def gradient_tiles(
    x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share_ptr, more_ptr, rows, eps, first, last, turns, own: gl.constexpr,
    pair_s, out_s, full_s, empty_s, beta_s, gamma_s, STAGES: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """dx of one tile of each pair, by four warps."""
    sl: gl.constexpr = sums_of_lanes(gl.full([ROWS, WIDTH], 0.0, gl.float32, CHANNELS)).type.layout
    beta_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    gamma_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for both in range(first, last):
        p = (2 * both + own) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside = (p < rows)[:, None]
        cells = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        x = load_rows(x_ptr, cells, inside)
        dy = gl.load(dy_ptr + cells, mask=inside, other=0.0)
        mean, rstd = statistics(x, eps)
        n = half_normal(x, gamma_ptr, beta_ptr, mean, rstd)
        gl.store(n_ptr + cells, n, mask=inside)
        dn = through_hidden(n, dy, pair_s, out_s, full_s, empty_s, turns, STAGES)
        # x is read again (from L2): keeping the tile would cost its registers through the products.
        x = load_rows(x_ptr, cells, inside)
        normal = (x - mean[:, None]) * rstd[:, None]
        dn = gl.convert_layout(turned_about(dn), CHANNELS)
        beta_s.store(beta_s.load(sl) + sums_of_lanes(dn))
        gamma_s.store(gamma_s.load(sl) + sums_of_lanes(dn * normal))
        dn = dn * gl.load(gamma_ptr + c).to(gl.float32)[None, :]
        less = gl.sum(dn, 1) * (1.0 / WIDTH)
        slope = gl.sum(dn * normal, 1) * (1.0 / WIDTH)
        dx = (dn - less[:, None] - normal * slope[:, None]) * rstd[:, None]
        if MORE:
            dx += load_rows(more_ptr, cells, inside)
        gl.store(dx_ptr + cells, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    barrier()
    columns: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 4], [1, 0])
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, columns))
    gl.store(share_ptr + t, gl.sum(gamma_s.load(columns), 0))
    gl.store(share_ptr + WIDTH + t, gl.sum(beta_s.load(columns), 0))


@gluon.jit(repr=profiled_as("transition_input_gradient_hopper"), do_not_specialize=["group"])
def input_gradient_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, dy_ptr, dx_ptr, n_ptr, norm_partial_ptr, more_ptr, rows, group, turns, eps,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dx and LN(x) / 2 `[rows, 128]` of `group` pairs of tiles of 64 rows, and two shares of dγ and dβ. Four warps, five besides.

    `turns`: CHUNKS / STAGES, an even number.
    """
    gl.assume(rows > 0)
    gl.assume(group > 0)
    banks: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    a_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    a_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    pair_s, out_s, full_s, empty_s = make_ring(STAGES)
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (rows + 2 * ROWS - 1) // (2 * ROWS))
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (4 * WIDTH)
    steps = gl.maximum(last - first, 0) * CHUNKS
    gl.warp_specialize(
        [
            (gradient_tiles, (x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share, more_ptr, rows, eps, first, last, turns, 0, pair_s, out_s, full_s, empty_s, a_beta, a_gamma, STAGES, MORE)),
            (gradient_tiles, (x_ptr, gamma_ptr, beta_ptr, dy_ptr, dx_ptr, n_ptr, share + 2 * WIDTH, more_ptr, rows, eps, first, last, turns, 1, pair_s, out_s, full_s, empty_s, b_beta, b_gamma, STAGES, MORE)),
            (bring, (w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
