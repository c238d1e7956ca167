"""Forward kernel of the transition for Hopper in Gluon, Triton's lower level, which says itself when a product is waited for.

It computes what `kernels.forward_kernel` does. The products of the next chunk of hidden units run beside the arithmetic of this
one, and its weights arrive meanwhile; Triton waits for a product where it is asked for. bf16 weights, sm_90.
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

from optimized.ops.gluon_parts import barrier, fast_tanh
from optimized.ops.names import profiled_as


@gluon.jit
def fetch_pair(w_ptr, into, C: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """BN rows of w_a and of w_b in turns of eight, as `kernels.load_pair`, on their way."""
    r = gl.arange(0, 2 * BN, gl.SliceLayout(1, layout))
    c = gl.arange(0, C, gl.SliceLayout(0, layout))
    # What all of a lane's rows share first: the rest is a number known while compiling.
    cells = w_ptr + (r % 8 * C)[:, None] + c[None, :]
    cells = cells + (r // 8 % 2 * (H * C) + r // 16 * (8 * C))[:, None]
    async_copy.async_copy_global_to_shared(into, cells)


@gluon.jit
def fetch_columns(w_ptr, into, C: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """BN columns of w_out, on their way."""
    c = gl.arange(0, C, gl.SliceLayout(1, layout))
    j = gl.arange(0, BN, gl.SliceLayout(0, layout))
    cells = w_ptr + (c % 16 * H)[:, None] + j[None, :]
    async_copy.async_copy_global_to_shared(into, cells + (c // 16 * (16 * H))[:, None])


@gluon.jit
def cells_of(C: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr):
    """Where the cells of BM rows are from the first on."""
    return gl.arange(0, BM, gl.SliceLayout(1, layout))[:, None] * C + gl.arange(0, C, gl.SliceLayout(0, layout))[None, :]  # fmt: skip


@gluon.jit
def half_normal(x, gamma_ptr, beta_ptr, eps, C: gl.constexpr, layout: gl.constexpr):
    """LN(x) / 2 of rows in fp32."""
    c = gl.arange(0, C, gl.SliceLayout(0, layout))
    x = x - (gl.sum(x, 1) / C)[:, None]
    rstd = gl.rsqrt(gl.sum(x * x, 1) / C + eps)
    gamma = gl.load(gamma_ptr + c).to(gl.float32) * 0.5
    beta = gl.load(beta_ptr + c).to(gl.float32) * 0.5
    return (x * rstd[:, None] * gamma[None, :] + beta[None, :]).to(gl.bfloat16)


@gluon.jit
def hidden(pair, layout: gl.constexpr):
    """swish(a) · b / 2 of a chunk, as the operand of the next product."""
    R: gl.constexpr = pair.shape[0]
    BN: gl.constexpr = pair.shape[1] // 2
    a, b = gl.split(gl.permute(gl.reshape(pair, (R, BN // 8, 2, 8)), (0, 1, 3, 2)))
    h = ((a * fast_tanh(a) + a) * b).to(gl.bfloat16)
    return gl.convert_layout(gl.reshape(h, (R, BN)), layout)


@gluon.jit
def chunk(
    n_s, p_s, o_s, w_ptr, pair, acc, none, j: gl.constexpr, AFTER: gl.constexpr,
    C: gl.constexpr, H: gl.constexpr, BN: gl.constexpr, xl: gl.constexpr, ol: gl.constexpr, h_l: gl.constexpr,
):  # fmt: skip
    """Adds what chunk j, of which `pair` is there, gives to y, and makes the next pair; AFTER: how many chunks come after it."""
    half: gl.constexpr = j % 2
    async_copy.wait_group(0)
    barrier()
    if AFTER > 0:
        ahead = warpgroup_mma(n_s, p_s.index(1 - half).permute((1, 0)), none, use_acc=False, is_async=True)
    h = hidden(pair, h_l)
    acc = warpgroup_mma(h, o_s.index(half).permute((1, 0)), acc, is_async=True)
    # Not before: their addresses take the registers of the pair.
    if AFTER > 1:
        fetch_pair(w_ptr + (j + 2) * (BN * C), p_s.index(half), C, H, BN, xl)
    if AFTER > 0:
        fetch_columns(w_ptr + (2 * H * C + (j + 1) * BN), o_s.index(1 - half), C, H, BN, ol)
        async_copy.commit_group()
    # h goes through the wait too, so that nothing else takes its registers before.
    if AFTER > 0:
        pair, acc, h = warpgroup_mma_wait(0, deps=[ahead, acc, h])
    else:
        acc, h = warpgroup_mma_wait(0, deps=[acc, h])
    return pair, acc


@gluon.jit(repr=profiled_as("transition_forward_hopper"))
def forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, out_ptr, rows, eps,
    C: gl.constexpr, H: gl.constexpr, ADDED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One tile of BM rows, of at least as many: y = h·w_outᵀ, BN hidden units at a time. ADDED: x + y. H is a multiple of BN."""
    gl.assume(rows > 0)
    xl: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [num_warps, 1], [1, 0])
    ol: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [num_warps, 1], [1, 0])
    pair_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, 2 * BN, 16])
    acc_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, C, 16])
    h_l: gl.constexpr = gl.DotOperandLayout(0, acc_l, 2)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.NVMMASharedLayout(2 * BN if BN < 64 else 128, 16, 2)
    CHUNKS: gl.constexpr = H // BN
    n_s = gl.allocate_shared_memory(gl.bfloat16, [BM, C], wide)
    p_s = gl.allocate_shared_memory(gl.bfloat16, [2, 2 * BN, C], wide)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [2, C, BN], narrow)
    none = gl.full([BM, 2 * BN], 0.0, gl.float32, pair_l)
    fetch_pair(w_ptr, p_s.index(0), C, H, BN, xl)
    async_copy.commit_group()
    fetch_pair(w_ptr + BN * C, p_s.index(1), C, H, BN, xl)
    fetch_columns(w_ptr + 2 * H * C, o_s.index(0), C, H, BN, ol)
    async_copy.commit_group()
    # The last tile ends with the last row, and repeats what the one before does: a mask would spill registers.
    first = gl.minimum(gl.program_id(0) * BM, rows - BM)
    x_ptr += first.to(gl.int64) * C
    out_ptr += first.to(gl.int64) * C
    cells = cells_of(C, BM, xl)
    x = gl.load(x_ptr + cells).to(gl.float32)
    n_s.store(half_normal(x, gamma_ptr, beta_ptr, eps, C, xl))
    fence_async_shared()
    async_copy.wait_group(1)
    barrier()
    pair = warpgroup_mma(n_s, p_s.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    pair = warpgroup_mma_wait(0, deps=[pair])
    acc = gl.full([BM, C], 0.0, gl.float32, acc_l)
    for j in gl.static_range(CHUNKS):
        pair, acc = chunk(n_s, p_s, o_s, w_ptr, pair, acc, none, j, CHUNKS - 1 - j, C, H, BN, xl, ol, h_l)
    y = acc * 2.0
    if not ADDED:
        # Through the tile of n, which is spent.
        n_s.store(y.to(gl.bfloat16))
        barrier()
        gl.store(out_ptr + cells, n_s.load(xl))
    else:
        # x is read again (from L2), and not before now: it would cost registers. Four lanes hold 32 bytes of a row in float32.
        there: gl.constexpr = acc_l if out_ptr.dtype.element_ty == gl.float32 else xl
        cells = cells_of(C, BM, there)
        y = gl.convert_layout(y, there) + gl.load(x_ptr + cells).to(gl.float32)
        gl.store(out_ptr + cells, y.to(out_ptr.dtype.element_ty))
