"""Device functions shared by the fused operators: layer norm of a tile of rows, forward and backward.

Tiles are `[rows, columns]` in fp32, padded to a power of two columns; the padding holds zeros and stays out
of the statistics. Everything here is inlined into the kernels that call it.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in fp32."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def normalise_rows(x, columns, eps, C: tl.constexpr):
    """(x - mean) · rstd of every row of the fp32 tile `x [R, BC]`, and rstd `[R]`; C real columns."""
    mean = tl.sum(x, 1) / C
    centred = x - mean[:, None]
    if x.shape[1] != C:
        centred = tl.where((columns < C)[None, :], centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


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
