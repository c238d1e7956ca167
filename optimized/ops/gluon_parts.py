"""What kernels in Gluon, Triton's lower level, share. Triton without Gluon, or with another one, fails to import this."""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper  # noqa: F401 (all of them need it)

WIDTH = gl.constexpr(128)
"""Channels, where kernels know one number of them."""
CHANNELS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
"""The layout of a product of 64 rows by four warps with its 128 columns as channels: eight of a lane one after another, and four
lanes beside each other. A tensor of rows goes from memory to registers and back 16 bytes a lane, 64 of four lanes."""
WHOLE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Of that product itself, and of one with 16 columns."""
BESIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
# Its name in Triton 3.6, and since.
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def fast_tanh(x):
    """tanh(x) by the card's instruction."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def value_of(n):
    """Which value column n of a product's results stands for where a lane is to hold eight values one after another, twice in 64.

    The matrix unit leaves a lane columns 8j + 2q and 8j + 2q + 1: what it reads has to lie in this order.
    """
    return n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2


@gluon.jit
def turned_about(x):
    """`[rows, columns]` as products have the columns, as channels; or the other way: a view of what each lane holds."""
    blocks: gl.constexpr = x.shape[1] // 32
    apart = gl.permute(gl.reshape(x, (x.shape[0], blocks, 4, 4, 2)), (0, 1, 3, 2, 4))
    return gl.reshape(apart, (x.shape[0], x.shape[1]))
