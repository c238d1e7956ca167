"""Planes of dbias added up in their order, so that no gradient is added atomically."""

# ruff: noqa: ANN001, ANN201, RUF005 (Triton compiles these functions: an annotation would mean a constant, and tuples
# grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.attention.packing import packed_head, plain_order
from optimized.ops.names import profiled_as


@triton.jit(repr=profiled_as("attention_fold"), do_not_specialize=["planes", "size"])
def fold_kernel(PARTS, OUT, planes, size, BLOCK: tl.constexpr):
    """OUT[x] = sum over planes p, in order, of PARTS[p, x] in fp32; PARTS [planes, size], OUT [size]."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = x < size
    wide_size = tl.full((), 0, tl.int64) + size
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(planes):
        total += tl.load(PARTS + p * wide_size + x, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + x, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def fold_planes(
    pid, PLANES, SUM, OUT, H, x_length, y_length, groups, continues,
    TILE: tl.constexpr, TRANSPOSED: tl.constexpr, BY: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Program `pid` of those that add planes of dbias in their order, in fp32, after SUM if this `continues`, into OUT.

    PLANES [B, groups, H, packed X x Y]; SUM fp32 and OUT of any dtype, contiguous, [B, H, X, Y] or, TRANSPOSED,
    [B, H, Y, X]. A program takes 16 rows and BY columns of one head's planes, and asks for TOGETHER of them before
    it adds the first.
    """
    VECTOR: tl.constexpr = 4 if PLANES.dtype.element_ty == tl.float32 else 8
    y_tiles = tl.cdiv(y_length, BY)
    x_tiles = tl.cdiv(x_length, 16)
    y0 = (pid % y_tiles).to(tl.int32) * BY
    x0 = (pid // y_tiles % x_tiles).to(tl.int32) * 16
    h = pid // y_tiles // x_tiles % H
    b = pid // y_tiles // x_tiles // H
    y_blocks = tl.cdiv(y_length, TILE) * (TILE // 16)
    size = H * y_blocks * (tl.cdiv(x_length, TILE) * (TILE // 16)).to(tl.int64) * 256
    first = packed_head(PLANES, b * groups, h, H, x_length, y_length, TILE)
    first += ((x0 // 16).to(tl.int64) * y_blocks + y0 // 16) * 256
    values = first + ((tl.arange(0, BY // 16) * 256)[:, None] + tl.arange(0, 256)[None, :])
    total = tl.zeros((BY // 16, 256), tl.float32)
    whole = groups // TOGETHER * TOGETHER
    for _ in range(0, whole, TOGETHER):
        parts = ()
        for i in tl.static_range(TOGETHER):
            parts = parts + (tl.load(values + i * size),)
        for i in tl.static_range(TOGETHER):
            total += parts[i].to(tl.float32)
        values += TOGETHER * size
    for _ in range(whole, groups):
        total += tl.load(values).to(tl.float32)
        values += size
    x = x0 + tl.arange(0, 16)
    y = y0 + tl.arange(0, BY)
    out = plain_order(total, BY, VECTOR)
    target = (b * H + h) * x_length * y_length
    if TRANSPOSED:
        out = tl.trans(out)
        inside = (y < y_length)[:, None] & (x < x_length)[None, :]
        target += (y.to(tl.int64) * x_length)[:, None] + x[None, :]
    else:
        inside = (x < x_length)[:, None] & (y < y_length)[None, :]
        target += (x.to(tl.int64) * y_length)[:, None] + y[None, :]
    out += tl.load(SUM + target, mask=inside & continues, other=0.0)
    tl.store(OUT + target, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(
    repr=profiled_as("attention_fold_planes"), do_not_specialize=["H", "x_length", "y_length", "groups"]
)
def fold_planes_kernel(
    PLANES, SUM, OUT, H, x_length, y_length, groups,
    CONTINUES: tl.constexpr, TILE: tl.constexpr, BY: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """`fold_planes` alone, of the planes of `grad_q_kernel`."""
    fold_planes(
        tl.program_id(0).to(tl.int64), PLANES, SUM, OUT, H, x_length, y_length, groups, CONTINUES,
        TILE, False, BY, TOGETHER,
    )  # fmt: skip
