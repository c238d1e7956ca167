"""What both forward kernels for Hopper share: `hopper_project`, `hopper_output`.

They are in Gluon, Triton's lower level, which says itself when a product is waited for, and compute what
`folded.project_kernel` and `folded_output.forward_kernel` do from the same folded weights. Two things differ:

- Each takes the statistics of what it reads itself, beside the products, so that nothing reads z or the contraction
  before: nine passes over N²·128 values instead of eleven, those of the contraction among them.
- One program holds all weights and takes every channel of a tile. Products of the next half of the channels, or of the next
  tile, run beside the arithmetic of the ones before; Triton waits for a product where it is asked for.

bf16, 128 channels of z and of the contraction, sm_90; strides and addresses of z divisible by 16. Channels are the rows of all
products, positions their columns.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

WIDTH = gl.constexpr(128)
"""Channels of z and of the contraction."""
TILE = gl.constexpr(64)
"""Positions of a step."""


@gluon.jit
def value_of(n):
    """Which value column n of a product's results stands for where a lane is to hold eight values one after another, twice in 64.

    The matrix unit leaves a lane columns 8j + 2q and 8j + 2q + 1: what it reads has to lie in this order.
    """
    return n // 32 * 32 + n // 2 % 4 * 8 + n // 8 % 4 * 2 + n % 2


@gluon.jit
def pair_of(p, n_tokens, padded):
    """Whether positions p of the padded square are inside the real one, their rows and their columns."""
    i = p // padded
    j = p % padded
    return (i < n_tokens) & (j < n_tokens), i, j


@gluon.jit
def fetch_rows(z_ptr, into, p, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr, layout: gl.constexpr, on):  # fmt: skip
    """Rows of z at the positions p, on their way; outside the real square any row."""
    if EVEN:
        source = p.to(gl.int64) * WIDTH
    else:
        inside, i, j = pair_of(p, n_tokens, padded)
        source = gl.where(inside, i.to(gl.int64) * stride_i + j.to(gl.int64) * stride_j, 0)
    cells = z_ptr + source[:, None] + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    async_copy.async_copy_global_to_shared(into, cells, mask=on)


@gluon.jit
def load_rows(ptr, first, layout: gl.constexpr):
    """128 rows of weights `[rows, 128]`, from row `first` on."""
    r = first + gl.arange(0, WIDTH, gl.SliceLayout(1, layout))
    return gl.load(ptr + r[:, None] * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :])
