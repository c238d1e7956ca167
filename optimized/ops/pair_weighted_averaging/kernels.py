"""Averages over tokens with one set of weights for all rows of an alignment.

w = softmax_j(logits) `[H, I, J]` is small and made once. The average o_sih = Σ_j w_hij v_sjh is, per head, one
product of `[I, J]` with `[J, S·D]`; v stays as its projection wrote it, `[S, J, H, D]`: column n of the product is
channel n mod D of row n div D, a run of D values, so neither v nor o is permuted or copied.

FLOP: 2·H·I·J·S·D forward; backward twice that: dv is the same product with w transposed, dw_hij = Σ_s do_sih·v_sjh
contracts rows and channels, its shares summed in order by the softmax's backward. Elements moved: v and o forward
(v again for every BM tokens i, from the cache), do, v, dv backward. The weights are the only N² intermediate.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.exponential import LOG2E, exact_exp
from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate


@triton.jit
def powers(x, EXACT: tl.constexpr):
    """2^x, or e^x to the last bit if EXACT."""
    if EXACT:
        return exact_exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def load_logits(
    logits_ptr,
    mask_ptr,
    j,
    h,
    columns,
    stride_h,
    stride_j,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    H: tl.constexpr,
):
    """logits in units of log 2, natural ones if EXACT, `[BJ, BH]`; -inf for keys that are masked or do not exist."""
    inside = (j < columns)[:, None] & (h < H)[None, :]
    where = j.to(tl.int64)[:, None] * stride_j + h.to(tl.int64)[None, :] * stride_h
    x = tl.load(logits_ptr + where, mask=inside, other=float("-inf")).to(tl.float32)
    if not EXACT:
        x *= LOG2E
    if MASKED:
        kept = tl.load(mask_ptr + j, mask=j < columns, other=0)
        x = tl.where((kept != 0)[:, None], x, float("-inf"))
    return x


@triton.jit(
    repr=profiled_as("pair_weighted_averaging_softmax"),
    do_not_specialize=["columns", "stride_h", "stride_i", "stride_j"],
)
def softmax_kernel(
    logits_ptr,
    mask_ptr,
    w_ptr,
    lse_ptr,
    rows,
    columns,
    pitch,
    stride_h,
    stride_i,
    stride_j,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BJ: tl.constexpr,
):
    """w `[H, rows, pitch]` of one token i and all heads, and its log-sum-exp `[rows, H]`.

    Powers of two, in units of log 2; of e, in natural ones and to the last bit, if EXACT (for fp32 weights).
    """
    i = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    logits_ptr += i * stride_i
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    for start in range(0, columns, BJ):
        j = start + tl.arange(0, BJ)
        x = load_logits(logits_ptr, mask_ptr, j, h, columns, stride_h, stride_j, MASKED, EXACT, H)
        new = tl.maximum(top, tl.max(x, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * powers(top - base, EXACT) + tl.sum(powers(x - base[None, :], EXACT), 0)
        top = new
    logarithm = tl.log(total) if EXACT else tl.log2(total)
    lse = tl.where(total > 0.0, top + logarithm, float("-inf"))
    tl.store(lse_ptr + i * H + h, lse, mask=h < H)
    base = tl.where(total > 0.0, top if EXACT else lse, 0.0)
    for start in range(0, columns, BJ):
        j = start + tl.arange(0, BJ)
        x = load_logits(logits_ptr, mask_ptr, j, h, columns, stride_h, stride_j, MASKED, EXACT, H)
        w = powers(x - base[None, :], EXACT)
        if EXACT:
            w = tl.div_rn(w, tl.where(total > 0.0, total, 1.0)[None, :] + tl.zeros_like(w))
        w = w.to(w_ptr.dtype.element_ty)
        where = (h[None, :].to(tl.int64) * rows + i) * pitch + j[:, None]
        tl.store(w_ptr + where, w, mask=(j < columns)[:, None] & (h < H)[None, :])


@triton.jit(
    repr=profiled_as("pair_weighted_averaging_softmax_backward"),
    do_not_specialize=["rows", "columns", "splits", "stride_h", "stride_i", "stride_j"],
)
def softmax_backward_kernel(
    logits_ptr,
    mask_ptr,
    lse_ptr,
    dw_ptr,
    dlogits_ptr,
    rows,
    columns,
    splits,
    stride_h,
    stride_i,
    stride_j,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    H: tl.constexpr,
    BH: tl.constexpr,
    BJ: tl.constexpr,
):
    """dlogits = w (dw - Σ_j w dw) of one token i, dw the ordered sum of its `splits` shares `[splits, H, rows, columns]`."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    logits_ptr += i * stride_i
    lse = tl.load(lse_ptr + i * H + h, mask=h < H, other=0.0)
    base = tl.where(lse == float("-inf"), 0.0, lse)
    plane = tl.cast(H, tl.int64) * rows * columns
    mean = tl.zeros([BH], tl.float32)
    for step in tl.static_range(2):
        for start in range(0, columns, BJ):
            j = start + tl.arange(0, BJ)
            inside = (j < columns)[:, None] & (h < H)[None, :]
            x = load_logits(logits_ptr, mask_ptr, j, h, columns, stride_h, stride_j, MASKED, EXACT, H)
            w = powers(x - base[None, :], EXACT)
            share = dw_ptr + (h[None, :].to(tl.int64) * rows + i) * columns + j[:, None]
            dw = tl.zeros([BJ, BH], tl.float32)
            for split in range(splits):
                dw += tl.load(share + split * plane, mask=inside, other=0.0)
            if step == 0:
                mean += tl.sum(w * dw, 0)
            else:
                where = i * stride_i + j.to(tl.int64)[:, None] * stride_j + h.to(tl.int64)[None, :] * stride_h
                d = w * (dw - mean[None, :])
                tl.store(dlogits_ptr + where, d.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def folded(n, token, samples, length, head, H: tl.constexpr, D: tl.constexpr):
    """Offsets of (row n div D, token, head, channel n mod D) in `[samples, length, H, D]`; n and token broadcast."""
    row = (n // D).to(tl.int64)
    return ((row * length + token) * H + head) * D + n % D


@triton.jit(
    repr=profiled_as("pair_weighted_averaging_average"), do_not_specialize=["rows", "columns", "samples"]
)
def average_kernel(
    w_ptr,
    v_ptr,
    o_ptr,
    rows,
    columns,
    samples,
    w_rows,
    pitch,
    TRANSPOSED: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o `[samples, rows, H, D]` = Σ_k w_hmk v `[samples, columns, H, D]`; with TRANSPOSED, w_hkm instead."""
    tiles = tl.cdiv(rows, BM)
    head = tl.program_id(0) // tiles
    m = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    real = n < samples * D
    w_ptr += head.to(tl.int64) * w_rows * pitch
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, columns, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        if TRANSPOSED:
            inside = (k < columns)[:, None] & (m < rows)[None, :]
            w = tl.trans(
                tl.load(w_ptr + k.to(tl.int64)[:, None] * pitch + m[None, :], mask=inside, other=0.0)
            )
        else:
            inside = (m < rows)[:, None] & (k < columns)[None, :]
            w = tl.load(w_ptr + m.to(tl.int64)[:, None] * pitch + k[None, :], mask=inside, other=0.0)
        where = folded(n[None, :], k[:, None], samples, columns, head, H, D)
        v = tl.load(v_ptr + where, mask=(k < columns)[:, None] & real[None, :], other=0.0)
        acc = accumulate(acc, w, v)
    where = folded(n[None, :], m[:, None], samples, rows, head, H, D)
    tl.store(o_ptr + where, acc.to(o_ptr.dtype.element_ty), mask=(m < rows)[:, None] & real[None, :])


@triton.jit(
    repr=profiled_as("pair_weighted_averaging_weight_gradient"),
    do_not_specialize=["rows", "columns", "samples", "splits"],
)
def weight_gradient_kernel(
    do_ptr,
    v_ptr,
    partial_ptr,
    rows,
    columns,
    samples,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dw of BM tokens i by BN tokens j of one head over every `splits`-th run of BK of the S·D products."""
    tiles = tl.cdiv(columns, BN)
    m = (tl.program_id(0) // tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    head = tl.program_id(1)
    split = tl.program_id(2)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(split * BK, samples * D, splits * BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        real = k < samples * D
        left = folded(k[None, :], m[:, None], samples, rows, head, H, D)
        do = tl.load(do_ptr + left, mask=(m < rows)[:, None] & real[None, :], other=0.0)
        right = folded(k[None, :], n[:, None], samples, columns, head, H, D)
        v = tl.load(v_ptr + right, mask=(n < columns)[:, None] & real[None, :], other=0.0)
        acc = accumulate(acc, do, tl.trans(v))
    # Within a plane 32 bits suffice: with 64 for each value the addresses would not fit into the registers.
    plane_ptr = partial_ptr + (split.to(tl.int64) * H + head) * rows * columns
    tl.store(
        plane_ptr + m[:, None] * columns + n[None, :], acc, mask=(m < rows)[:, None] & (n < columns)[None, :]
    )
