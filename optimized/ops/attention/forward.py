"""Forward kernel of attention with a pair bias shared by all rows.

    s[r,h,q,k] = scale * q[r,h,q,:] . k[r,h,k,:] + bias[h,q,k]
    o[r,h,q,:] = sum over kept k of softmax_k(s) * v[r,h,k,:],   lse[r,h,q] = log sum over kept k of exp(s)

One program owns a query tile of ROWS rows of one head. The bias comes in packed order (`packing`), so that adding it
costs no exchange between threads.

Softmax needs no running maximum as long as nothing overflows: floating point is scale free. The main loop therefore
sums exp2(s) as it is, without maximum or rescaling, and the sum is checked at the end. Where it left the safe window
(|logits| above about 55, or a row without a kept key) the program repeats those rows with the running maximum. With
16-bit floats of 5 exponent bits (fp16) the running maximum is always used.

A product of scores is waited for where it is asked for, unless it is for the next step: Triton lets products run on
whose result nothing needs before the first wait of a step. The scores of the last AHEAD rows are therefore computed a
step early. At least one row must not be ahead, whose wait they need.

Cost for R rows, head size D, e bytes per element: 4*R*H*Q*K*D FLOP, R*H*Q*K exponentials; from HBM q, k, v, o once
and the bias once per L2 lifetime; from L2 per score 2e*D/BQ (keys and values) + e/ROWS (bias) bytes.
"""

# ruff: noqa: ANN001, ANN201, ANN202, E741, RUF005 (Triton compiles these functions: an annotation would mean a constant,
# and tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator, var-annotated"
import triton
import triton.language as tl

from optimized.ops.attention.packing import (
    load_columns,
    load_packed,
    packed_pointers,
    spread,
    unpacked,
)
from optimized.ops.exponential import exact_exp
from optimized.ops.names import profiled_as

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST_SUM = tl.constexpr(2.0**-80)
HIGHEST_SUM = tl.constexpr(2.0**80)
LENGTHS = ("R", "H", "LQ", "LK")


def strides_of(*names: str) -> tuple[str, ...]:
    """Argument names of the batch, row, head and token strides of the named tensors."""
    return tuple(f"{n}_{axis}" for n in names for axis in ("b", "r", "h", "l"))


@triton.jit
def head_of(base, b, row, h, s_b, s_r, s_h):
    """Start of one row and head; strides in units of 8 elements."""
    return base + (b * s_b + row * s_r + h * s_h) * 8


@triton.jit
def token(base, start, stride):
    """`base` moved to a token; stride in units of 8 elements."""
    return base + (tl.full((), 0, tl.int64) + start) * stride * 8


@triton.jit
def tile_offsets(stride, d, N: tl.constexpr):
    """Offsets [N, d] of N tokens from the first; stride in units of 8 elements."""
    return (tl.arange(0, N) * (stride * 8))[:, None] + d[None, :]


@triton.jit
def powers(x, EXACT: tl.constexpr):
    """exp of scores, which are in log2 units, or in natural units when EXACT.

    Log2 units save a multiplication; natural ones, for fp32, round the large terms as the definition does.
    """
    return exact_exp(x) if EXACT else tl.math.exp2(x)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. In fp32 the product is summed apart: short chains of additions lose fewer bits.

    `max_num_imprecise_acc` says nothing to fp32 products but keeps Triton from folding the sum into them again.
    """
    if a.dtype == tl.float32:
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def natural_log(x, EXACT: tl.constexpr):
    """log of sums; EXACT adds one Newton step to the hardware's approximation, which is good to 2**-22 only."""
    y = tl.math.log2(x) * LN2
    if EXACT:
        y += x * powers(-y, True) - 1.0
    return y


@triton.jit
def in_units(bias, EXACT: tl.constexpr):
    """Bias in the units of `powers`."""
    return bias if EXACT else bias * LOG2E


@triton.jit
def row_sums(p, BQ: tl.constexpr, BK: tl.constexpr):
    """Sums [BQ, 4] of a tile's rows, one for each of the four threads that hold a row: no exchange between them."""
    return tl.sum(tl.sum(tl.reshape(p, (BQ, BK // 8, 4, 2)), 3), 1)


@triton.jit
def _online_row(
    q, kb, vb, pointers, MASK, mask_at, d, LK, k_l, v_l, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK_D: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row with a running maximum: (accumulator, sum, maximum in the units of `powers`)."""
    acc = tl.zeros((BQ, BLOCK_D), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    k_offsets = tile_offsets(k_l, d, BK)
    v_offsets = tile_offsets(v_l, d, BK)
    for k0 in tl.range(0, LK, BK, num_stages=STAGES):
        ki = k0 + tl.arange(0, BK)
        inside = (ki < LK)[:, None] & (d < D)[None, :]
        bias = in_units(unpacked(load_packed(pointers, k0 // BK, BK), BQ, BK, TYPE), EXACT)
        k = tl.load(token(kb, k0, k_l) + k_offsets, mask=inside, other=0.0)
        v = tl.load(token(vb, k0, v_l) + v_offsets, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit_scale + bias
        if HAS_MASK:
            s += spread(load_columns(MASK + mask_at, k0, BQ, BK), BQ, BK)
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = powers(s - shift[:, None], EXACT)
        alpha = powers(top - shift, EXACT)
        total = total * alpha + tl.sum(p, 1)
        acc = multiply_add(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
        top = new_top
    return acc, total, tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _any_key(MASK, mask_at, LK, HAS_MASK: tl.constexpr, TILE: tl.constexpr):
    """1 when the row keeps at least one key."""
    found = 1
    if HAS_MASK:
        found = 0
        for k0 in range(0, LK, TILE):
            keep = tl.load(MASK + mask_at + k0 + tl.arange(0, TILE)) == 0.0
            found = max(found, tl.max(keep.to(tl.int32)))
    return found


@triton.jit(
    repr=profiled_as("attention_forward"),
    do_not_specialize=[*LENGTHS, *strides_of("q", "k", "v", "o"), "mask_b", "mask_r"],
)
def forward_kernel(
    Q, K, V, BIAS, MASK, O, LSE, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, o_b, o_r, o_h, o_l, mask_b, mask_r, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Strides are in units of 8 elements. BIAS and MASK as `prepare_kernel` writes them, LSE contiguous [B, R, H, LQ].

    O may be fp16 where the rest is bf16; what lies beyond its range becomes its largest number.

    In fp32 as many numbers again follow it: exp(LSE) over the sum of exponentials, not quite one. A sum some 2¹³ has a
    logarithm near 9, whose rounding shifts all probabilities of a row by 3e-7. (A pointer of its own would cost 16-bit
    kernels registers.)
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    TYPE: tl.constexpr = BIAS.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LQ, BQ)
    groups = tl.cdiv(R, ROWS)
    first = (pid // tiles) % groups * ROWS
    h = (pid // tiles // groups) % H
    b = pid // tiles // groups // H
    q0 = (pid % tiles).to(tl.int32) * BQ
    qi = q0 + tl.arange(0, BQ)
    d = tl.arange(0, BLOCK_D)
    q_mask = (qi < LQ)[:, None] & (d < D)[None, :]
    q_offsets = tile_offsets(q_l, d, BQ)
    k_offsets = tile_offsets(k_l, d, BK)
    v_offsets = tile_offsets(v_l, d, BK)
    k_blocks = tl.cdiv(LK, TILE) * (TILE // 16)
    bias_head = BIAS + (b * H + h) * (tl.cdiv(LQ, TILE) * (TILE // 16)) * k_blocks * 256
    pointers = packed_pointers(bias_head, q0 // BQ, k_blocks, BQ)

    qs = ()
    kbs = ()
    vbs = ()
    accs = ()
    totals = ()
    masks_at = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        qb = token(head_of(Q, b, row, h, q_b, q_r, q_h), q0, q_l)
        qs = qs + (tl.load(qb + q_offsets, mask=q_mask, other=0.0),)
        kbs = kbs + (head_of(K, b, row, h, k_b, k_r, k_h),)
        vbs = vbs + (head_of(V, b, row, h, v_b, v_r, v_h),)
        masks_at = masks_at + ((b * mask_b + row * mask_r) * 8,)
        accs = accs + (tl.zeros((BQ, BLOCK_D), tl.float32),)
        totals = totals + (tl.zeros((BQ, 4), tl.float32),)

    if FAST:
        k_at = kbs
        v_at = vbs
        last = k_blocks // (BK // 16) - 1
        raw = load_packed(pointers, 0, BK)
        raw_masks = ()
        scores = ()
        for i in tl.static_range(ROWS):
            raw_masks = raw_masks + (load_columns(MASK + masks_at[i], 0, BQ, BK) if HAS_MASK else 0,)
            s = 0
            if i >= ROWS - AHEAD:
                inside = (tl.arange(0, BK) < LK)[:, None] & (d < D)[None, :]
                k = tl.load(kbs[i] + k_offsets, mask=inside, other=0.0)
                s = tl.dot(qs[i], tl.trans(k), input_precision=PRECISION)
            scores = scores + (s,)
        for k0 in tl.range(0, LK, BK, num_stages=STAGES):
            ki = k0 + tl.arange(0, BK)
            inside = (ki < LK)[:, None] & (d < D)[None, :]
            bias = in_units(unpacked(raw, BQ, BK, TYPE), EXACT)
            ahead = tl.minimum(k0 // BK + 1, last)
            new_masks = ()
            new_k_at = ()
            new_v_at = ()
            new_accs = ()
            new_totals = ()
            new_scores = ()
            for i in tl.static_range(ROWS):
                if i >= ROWS - AHEAD:
                    s = scores[i]
                else:
                    k = tl.load(k_at[i] + k_offsets, mask=inside, other=0.0)
                    s = tl.dot(qs[i], tl.trans(k), input_precision=PRECISION)
                v = tl.load(v_at[i] + v_offsets, mask=inside, other=0.0)
                new_k_at = new_k_at + (token(k_at[i], BK, k_l),)
                new_v_at = new_v_at + (token(v_at[i], BK, v_l),)
                if HAS_MASK:
                    s = s * unit_scale + (bias + spread(raw_masks[i], BQ, BK))
                else:
                    s = s * unit_scale + bias
                p = powers(s, EXACT)
                new_accs = new_accs + (multiply_add(p.to(v.dtype), v, accs[i], PRECISION),)
                new_totals = new_totals + (totals[i] + row_sums(p, BQ, BK),)
                new_masks = new_masks + (
                    load_columns(MASK + masks_at[i], ahead * BK, BQ, BK) if HAS_MASK else 0,
                )
            for i in tl.static_range(ROWS):
                s = 0
                if i >= ROWS - AHEAD:
                    beyond = (ki + BK < LK)[:, None] & (d < D)[None, :]
                    k = tl.load(new_k_at[i] + k_offsets, mask=beyond, other=0.0)
                    s = tl.dot(qs[i], tl.trans(k), input_precision=PRECISION)
                new_scores = new_scores + (s,)
            raw = load_packed(pointers, ahead, BK)  # not before: its registers are those of the bias in use
            scores = new_scores
            accs = new_accs
            totals = new_totals
            k_at = new_k_at
            v_at = new_v_at
            raw_masks = new_masks

    for i in tl.static_range(ROWS):
        row = first + i
        acc = accs[i]
        total = tl.sum(totals[i], 1)
        top = tl.zeros((BQ,), tl.float32)
        again = 1
        if FAST:
            sound = (total > LOWEST_SUM) & (total < HIGHEST_SUM) & (tl.abs(tl.sum(acc, 1)) < float("inf"))
            again = tl.max((~sound & (qi < LQ)).to(tl.int32))
        if again != 0:
            if _any_key(MASK, masks_at[i], LK, HAS_MASK, TILE) != 0:
                acc, total, top = _online_row(
                    qs[i], kbs[i], vbs[i], pointers, MASK, masks_at[i], d, LK, k_l, v_l, unit_scale,
                    HAS_MASK, D, BQ, BK, BLOCK_D, TYPE, PRECISION, 1 if FAST else STAGES, EXACT,
                )  # fmt: skip
            else:
                acc = tl.zeros((BQ, BLOCK_D), tl.float32)
                total = tl.zeros((BQ,), tl.float32)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        ob = token(head_of(O, b, row, h, o_b, o_r, o_h), q0, o_l)
        out = acc * inverse[:, None]
        if O.dtype.element_ty == tl.float16 and Q.dtype.element_ty != tl.float16:
            out = tl.minimum(tl.maximum(out, -65504.0), 65504.0)
        out = out.to(O.dtype.element_ty)
        tl.store(ob + tile_offsets(o_l, d, BQ), out, mask=q_mask & (row < R))
        highest = top if EXACT else top * LN2
        lse = tl.where(total == 0.0, float("-inf"), highest + natural_log(total, EXACT))
        line = ((b * R + row) * H + h) * LQ + qi
        tl.store(LSE + line, lse, mask=(qi < LQ) & (row < R))
        if EXACT:
            rounding = tl.where(total == 0.0, 1.0, powers(lse - top, True) * inverse)
            behind = tl.num_programs(0).to(tl.int64) // tiles // groups * R * LQ
            tl.store(LSE + behind + line, rounding, mask=(qi < LQ) & (row < R))
