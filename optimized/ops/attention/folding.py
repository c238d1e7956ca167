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


@triton.jit(repr=profiled_as("attention_fold_planes"), do_not_specialize=["H", "LQ", "LK", "groups"])
def fold_planes_kernel(
    PLANES, SUM, OUT, H, LQ, LK, groups,
    CONTINUES: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """OUT = sum over the planes of `grad_q_kernel` in their order, in fp32, after SUM where this CONTINUES.

    PLANES [B, groups, H, packed LQ x LK]; SUM [B, H, LQ, LK] fp32 and OUT of any dtype, contiguous. A program takes
    16 queries and BK keys of one head, and asks for TOGETHER planes before it adds the first of them.
    """
    VECTOR: tl.constexpr = 4 if PLANES.dtype.element_ty == tl.float32 else 8
    pid = tl.program_id(0).to(tl.int64)
    k_tiles = tl.cdiv(LK, BK)
    q_tiles = tl.cdiv(LQ, 16)
    k0 = (pid % k_tiles).to(tl.int32) * BK
    q0 = (pid // k_tiles % q_tiles).to(tl.int32) * 16
    h = pid // k_tiles // q_tiles % H
    b = pid // k_tiles // q_tiles // H
    k_blocks = tl.cdiv(LK, TILE) * (TILE // 16)
    size = H * k_blocks * (tl.cdiv(LQ, TILE) * (TILE // 16)).to(tl.int64) * 256
    first = packed_head(PLANES, b * groups, h, H, LQ, LK, TILE)
    first += ((q0 // 16).to(tl.int64) * k_blocks + k0 // 16) * 256
    values = first + ((tl.arange(0, BK // 16) * 256)[:, None] + tl.arange(0, 256)[None, :])
    total = tl.zeros((BK // 16, 256), tl.float32)
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
    qi = q0 + tl.arange(0, 16)
    ki = k0 + tl.arange(0, BK)
    inside = (qi < LQ)[:, None] & (ki < LK)[None, :]
    target = (b * H + h) * LQ * LK + ((qi.to(tl.int64) * LK)[:, None] + ki[None, :])
    out = plain_order(total, BK, VECTOR)
    if CONTINUES:
        out += tl.load(SUM + target, mask=inside, other=0.0)
    tl.store(OUT + target, out.to(OUT.dtype.element_ty), mask=inside)
