"""What the transition's kernels for Hopper share, in Gluon, Triton's lower level: weights in a ring, and rows normalised.

Two groups of four warps take tiles of 64 rows of their own, which the matrix unit reads from registers. A warp besides brings the
weights, 32 hidden units at a time, into a ring in shared memory, where both groups use them: they are read from the second
cache once for 128 rows.

bf16 weights, x in bf16 or fp32, 128 channels and a multiple of 256 hidden units; sm_90.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from optimized.ops.gluon_parts import CHANNELS, WIDTH, barrier, value_of, widened
from optimized.ops.names import profiled_as

UNITS = gl.constexpr(32)
"""Hidden units of a step."""


@gluon.jit(repr=profiled_as("transition_arrange"))
def arrange_kernel(a_ptr, b_ptr, w_ptr, out_ptr, H: gl.constexpr, num_warps: gl.constexpr):
    """The weights of a step: as many rows of w_a, of w_b and of w_outᵀ, channels as products have them."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    r = gl.arange(0, UNITS, gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    unit, c = gl.program_id(0) * UNITS + r, value_of(n)[None, :]
    cells = out_ptr + gl.program_id(0) * (3 * UNITS * WIDTH) + r * WIDTH + n[None, :]
    gl.store(cells, gl.load(a_ptr + unit * WIDTH + c).to(dtype))
    gl.store(cells + UNITS * WIDTH, gl.load(b_ptr + unit * WIDTH + c).to(dtype))
    gl.store(cells + 2 * UNITS * WIDTH, gl.load(w_ptr + c * H + unit).to(dtype))


@gluon.jit
def make_ring(STAGES: gl.constexpr):
    """Places for w_a and w_b, and for w_outᵀ, and what tells which of them are full and which empty."""
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    pair_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * UNITS, WIDTH], wide)
    out_s = gl.allocate_shared_memory(gl.bfloat16, [STAGES, UNITS, WIDTH], wide)
    full_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_s = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full_s.index(k), count=32)
        mbarrier.init(empty_s.index(k), count=2)
    fence_async_shared()
    barrier()
    return pair_s, out_s, full_s, empty_s


@gluon.jit
def bring(w_ptr, pair_s, out_s, full_s, empty_s, steps, CHUNKS: gl.constexpr, STAGES: gl.constexpr):
    """By one warp: the weights of a step after another, as soon as both groups have used what lies in their place."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0])
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    pair = gl.arange(0, 2 * UNITS, gl.SliceLayout(1, layout))[:, None] * WIDTH + c[None, :]
    out = (2 * UNITS + gl.arange(0, UNITS, gl.SliceLayout(1, layout)))[:, None] * WIDTH + c[None, :]
    for step in range(steps):
        at = step % STAGES
        mbarrier.wait(empty_s.index(at), (step // STAGES + 1) & 1)
        chunk = w_ptr + step % CHUNKS * (3 * UNITS * WIDTH)
        async_copy.async_copy_global_to_shared(pair_s.index(at), chunk + pair)
        async_copy.async_copy_global_to_shared(out_s.index(at), chunk + out)
        async_copy.mbarrier_arrive(full_s.index(at), increment_count=False)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def load_rows(ptr, cells, inside):
    """Rows of x in fp32, zero where there are none."""
    x = gl.load(ptr + cells, mask=inside, other=0.0)
    return widened(x) if x.dtype == gl.bfloat16 else x


@gluon.jit
def statistics(x, eps):
    """Mean and rstd of rows in fp32; two passes."""
    mean = gl.sum(x, 1) * (1.0 / WIDTH)
    off = x - mean[:, None]
    return mean, gl.rsqrt(gl.sum(off * off, 1) * (1.0 / WIDTH) + eps)


@gluon.jit
def half_normal(x, gamma_ptr, beta_ptr, mean, rstd):
    """LN(x) / 2 in bf16."""
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
    n = (x - mean[:, None]) * (0.5 * rstd)[:, None]
    return (n * gl.load(gamma_ptr + c).to(gl.float32)[None, :] + half_beta[None, :]).to(gl.bfloat16)
