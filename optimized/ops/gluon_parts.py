"""What kernels in Gluon, Triton's lower level, share. Triton without Gluon, or with another one, fails to import this."""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper  # noqa: F401 (all of them need it)

WIDTH = gl.constexpr(128)
"""Channels, where kernels know one number of them."""
ROWS = gl.constexpr(64)
"""Of a tile: what four warps' product has."""
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
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
BESIDE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
"""Of that product itself, and of those with 64, 32 and 16 columns."""
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
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


@gluon.jit
def in_halves(x, layout: gl.constexpr):
    """The left and the right half of the columns: a view of what each lane holds."""
    columns: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, columns)), (0, 2, 1)))
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(
        right, layout, assert_trivial=True
    )


@gluon.jit
def widened(x):
    """x, in bf16, in fp32: pairs that lie in one register take two instructions."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
        "=f,=f,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def sums_of_lanes(x):
    """An eighth of the rows of x: sums of eight each, two of a lane and two of each of three neighbours."""
    halves = gl.sum(gl.reshape(x, (x.shape[0] // 16, 2, 8, WIDTH)), 1)
    quarters = gl.sum(gl.reshape(halves, (x.shape[0] // 16, 2, 4, WIDTH)), 1)
    eighths = gl.sum(gl.reshape(quarters, (x.shape[0] // 16, 2, 2, WIDTH)), 1)
    return gl.reshape(eighths, (x.shape[0] // 8, WIDTH))


@gluon.jit
def place_rows(w_ptr, first, into, layout: gl.constexpr):
    """Rows of the weights one after another from `first` on, columns as products have them."""
    parts: gl.constexpr = into.shape[0]
    rows: gl.constexpr = into.shape[1]
    for k in gl.static_range(parts):
        t = first + k * rows + gl.arange(0, rows, gl.SliceLayout(1, layout))
        c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))


@gluon.jit
def ask_for(ptr, tile, on):
    """A tile's rows of 128 values, into the second cache; `on`: or not."""
    values: gl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
    for k in gl.static_range(ROWS * WIDTH // (128 * values)):
        line = (tile * (ROWS * WIDTH // values) + k * 128 + gl.arange(0, 128, FLAT)).to(gl.int64)
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l,r",
            [(ptr + line * values).to(gl.int64), ((line >= 0) & on).to(gl.int32)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
