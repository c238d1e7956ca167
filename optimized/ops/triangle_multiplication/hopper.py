"""What the kernels for Hopper share: `hopper_project`, `hopper_output`, `hopper_gradient`.

They are in Gluon, Triton's lower level, which says itself when a product is waited for, and compute what `folded.project_kernel`,
`folded_output.forward_kernel` and `gradients.input_gradient_kernel` do. Two things differ:

- Forward, each takes the statistics of what it reads itself, beside the products, so that nothing reads z or the contraction
  before: nine passes over N²·128 values instead of eleven, those of the contraction among them.
- One program holds all weights and takes every channel of a tile. Products of some channels, or of another tile, run beside the
  arithmetic of others; Triton waits for a product where it is asked for.

On the input side two groups of four warps take tiles of their own and never wait for each other. Positions are the rows of all
their products, so that what one leaves in registers can be the next one's operand. Columns of the weights lie in shared memory in
such an order that the values of a lane are channels one after another (`gluon_parts`).

bf16, 128 channels of z and of the contraction, sm_90; strides and addresses of z divisible by 16.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from optimized.ops.gluon_parts import WIDTH, value_of

TILE = gl.constexpr(64)
"""Positions of a step."""
STEP = gl.constexpr(64)
"""Channels of a and b at a time on the input side, of 256."""


@gluon.jit
def pair_of(p, n_tokens, padded):
    """Whether positions p of the padded square are inside the real one, their rows and their columns."""
    i = p // padded
    j = p % padded
    return (i < n_tokens) & (j < n_tokens), i, j


@gluon.jit
def places(p, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr):
    """Which positions p are inside the real square, where their rows of z begin, and which cells they are."""
    if EVEN:
        inside, cell = p >= 0, p.to(gl.int64)
        source = cell * WIDTH
    else:
        inside, i, j = pair_of(p, n_tokens, padded)
        cell = gl.where(inside, i.to(gl.int64) * n_tokens + j, 0)
        source = gl.where(inside, i.to(gl.int64) * stride_i + j.to(gl.int64) * stride_j, 0)
    return inside, source, cell


@gluon.jit
def place_both(w_ptr, into, layout: gl.constexpr):
    """Some rows at a time of the weights of the linear parts of a and b, and as many of their gates, columns as products have them."""
    parts: gl.constexpr = into.shape[0]
    step: gl.constexpr = into.shape[1] // 2
    for k in gl.static_range(parts):
        r = gl.arange(0, 2 * step, gl.SliceLayout(1, layout))
        t = r // step * (2 * WIDTH) + k * step + r % step
        c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))
