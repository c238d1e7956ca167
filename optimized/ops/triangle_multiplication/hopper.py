"""What the kernels for Hopper share: `hopper_project`, `hopper_output`, `hopper_gradient`.

They are in Gluon, Triton's lower level, which says itself when a product is waited for, and compute what `folded.project_kernel`,
`folded_output.forward_kernel` and `gradients.input_gradient_kernel` do. Two things differ:

- Forward, each takes the statistics of what it reads itself, beside the products, so that nothing reads z or the contraction
  before: nine passes over N²·128 values instead of eleven, those of the contraction among them.
- One program holds all weights and takes every channel of a tile. Products of some channels, or of another tile, run beside the
  arithmetic of others; Triton waits for a product where it is asked for.

On the input side two groups of four warps take tiles of their own and never wait for each other. Positions are the rows of all
their products, so that what one leaves in registers can be the next one's operand. Columns of the weights lie in shared memory in
such an order that the values of a lane are eight channels one after another, twice four times: a tensor of rows goes from memory
to registers and back 16 bytes a lane, 64 of four lanes.

bf16, 128 channels of z and of the contraction, sm_90; strides and addresses of z divisible by 16.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WIDTH = gl.constexpr(128)
"""Channels of z and of the contraction."""
TILE = gl.constexpr(64)
"""Positions of a step."""
STEP = gl.constexpr(64)
"""Channels of a and b at a time on the input side, of 256."""
CHANNELS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
"""The layout of a product by four warps with columns as channels: eight of a lane one after another, and four lanes beside each
other."""
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""Of a product with 64 columns."""


@gluon.jit
def value_of(n):
    """Which value column n of a product's results stands for where a lane is to hold eight values one after another, twice in 64.

    The matrix unit leaves a lane columns 8j + 2q and 8j + 2q + 1: what it reads has to lie in this order.
    """
    return n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2


@gluon.jit
def turned_about(x):
    """`[rows, 128]` of columns as products have them, as channels; or the other way: a view of what each lane holds."""
    return gl.reshape(gl.permute(gl.reshape(x, (x.shape[0], 4, 4, 4, 2)), (0, 1, 3, 2, 4)), (x.shape[0], 128))


@gluon.jit
def place_weights(w_ptr, into, first, layout: gl.constexpr):
    """64 rows at a time of the weights, from row `first` on, columns as products have them."""
    parts: gl.constexpr = into.shape[0]
    for k in gl.static_range(parts):
        t = first + k * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))


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
