"""Device functions shared by the fused operators: layer norm of a tile of rows, forward and backward.

Tiles are `[rows, columns]` in fp32, padded to a power of two columns; the padding holds zeros and stays out
of the statistics. Everything here is inlined into the kernels that call it.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.exponential import exact_exp


@triton.jit
def fast_tanh(x):
    """tanh(x) in fp32 by NVIDIA's instruction, relative error 2⁻¹¹."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x, FAST: tl.constexpr = False, EXACT: tl.constexpr = False):
    """1 / (1 + exp(-x)) in fp32, error some 2⁻²².

    FAST: (1 + tanh(x / 2)) / 2 with NVIDIA's tanh instruction, error 2⁻¹². EXACT, for fp32 results: rounded as the
    definition rounds, by an exponential and a division without the hardware's approximations.
    """
    if EXACT:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exact_exp(-x))
    elif FAST:
        return fast_tanh(x * 0.5) * 0.5 + 0.5
    else:
        return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def accumulate(acc, a, b):
    """acc + a·b. In fp32 the product is summed apart: short chains of additions lose fewer bits.

    `max_num_imprecise_acc` says nothing to fp32 products but keeps Triton from folding the sum into them again, which
    would make one chain of additions over everything that is accumulated.
    """
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def row_statistics(x, columns, eps, C: tl.constexpr, EXACT: tl.constexpr = False):
    """Mean and rstd `[R]` of the rows of the fp32 tile `x [R, BC]`; C real columns.

    EXACT, for fp32 results: rstd without the hardware's approximation.
    """
    mean = tl.sum(x, 1) / C
    centred = x - mean[:, None]
    if x.shape[1] != C:
        centred = tl.where((columns < C)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, 1) / C + eps
    if EXACT:
        rstd = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
    else:
        rstd = tl.rsqrt(variance)
    return mean, rstd


@triton.jit
def normalised(x, mean, rstd, columns, C: tl.constexpr):
    """(x - mean) · rstd of the fp32 tile `x [R, BC]`, zero in the padding."""
    centred = x - mean[:, None]
    if x.shape[1] != C:
        centred = tl.where((columns < C)[None, :], centred, 0.0)
    return centred * rstd[:, None]


@triton.jit
def normalise_rows(x, columns, eps, C: tl.constexpr, EXACT: tl.constexpr = False):
    """(x - mean) · rstd of every row of the fp32 tile `x [R, BC]`, and rstd `[R]`."""
    mean, rstd = row_statistics(x, columns, eps, C, EXACT)
    return normalised(x, mean, rstd, columns, C), rstd


@triton.jit
def normal_backward(grad, normal, rstd, C: tl.constexpr):
    """Gradient of (x - mean) · rstd to x, given the gradient to it; all fp32.

    `normal` is (x - mean) · rstd. Padding columns of `grad` and `normal` must be zero.
    """
    first = tl.sum(grad, 1) / C
    second = tl.sum(grad * normal, 1) / C
    return (grad - first[:, None] - normal * second[:, None]) * rstd[:, None]


@triton.jit
def normalise_rows_backward(grad, normal, gamma, rstd, C: tl.constexpr):
    """Gradient of layer norm to its input, given the gradient to its output; otherwise as `normal_backward`."""
    return normal_backward(grad * gamma[None, :], normal, rstd, C)


@triton.jit
def add_share(share_ptr, c, value, again, C: tl.constexpr):
    """Add `value` `[BC]` to the program's own partial sum in memory, or begin it (`again` false).

    Kept in memory between tiles: every thread of a column would hold it in registers through the loop.
    """
    tl.debug_barrier()
    before = tl.load(share_ptr + c, mask=(c < C) & again, other=0.0)
    tl.store(share_ptr + c, before + value, mask=c < C)


@triton.jit
def as_memory_lies(value, pointers, inside):
    """`value` `[R, BC]`, rounded to the dtype of the memory it is written to and read back from, in fp32.

    Matrix products spread the rows of a tile over the lanes of a warp; read from memory a thread has runs of columns
    of several rows, so that sums over rows are additions in a thread, and no later operation moves values about.
    """
    tl.store(pointers, value.to(pointers.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def finish_rows(
    grad,
    normal,
    rstd,
    gamma,
    dx_ptr,
    share_ptr,
    more_ptr,
    tile,
    inside,
    c,
    again,
    C: tl.constexpr,
    MORE: tl.constexpr,
):
    """Layer-norm backward of a tile: dx at the offsets `tile`, and the program's shares of dγ and dβ.

    Arguments as of `normalise_rows_backward` and `add_share`. `grad` may have come by way of dx: the barriers in
    `add_share` keep dx from being written before every thread has read it. MORE: another gradient of x is added to dx.
    """
    add_share(share_ptr, c, tl.sum(grad * normal, 0), again, C)
    add_share(share_ptr + C, c, tl.sum(grad, 0), again, C)
    dx = normalise_rows_backward(grad, normal, gamma, rstd, C)
    if MORE:
        tl.debug_barrier()  # or the load is moved up, to where there are no registers for it
        dx += tl.load(more_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + tile, dx.to(dx_ptr.dtype.element_ty), mask=inside)
