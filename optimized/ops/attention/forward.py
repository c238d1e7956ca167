"""Forward kernel of attention with a pair bias shared by all rows.

    s[r,h,q,k] = scale * q[r,h,q,:] . k[r,h,k,:] + bias[h,q,k]
    o[r,h,q,:] = sum over kept k of softmax_k(s) * v[r,h,k,:],   lse[r,h,q] = log sum over kept k of exp(s)

One program owns a query tile of ROWS rows of one head. Loading a bias tile from the L2 cache and bringing it into
the layout of the matrix unit costs more than the matrix products at head size 32, so the tile is loaded once for
ROWS rows.

Softmax needs no running maximum as long as nothing overflows: floating point is scale free. The main loop therefore
sums exp2(s) as it is, without maximum or rescaling, and the sum is checked at the end. Where it left the safe window
(|logits| above about 55, or a row without a kept key) the program repeats those rows with the running maximum. With
16-bit floats of 5 exponent bits (fp16) the running maximum is always used.

A masked key costs nothing per score: its key and value are loaded as zeros and its weight in the sum is zero.

Cost for R rows, head size D, e bytes per element: 4*R*H*Q*K*D FLOP, R*H*Q*K exponentials; from HBM q, k, v, o once
and the bias once per L2 lifetime; from L2 per score 2e*D/BQ (keys and values) + e/ROWS (bias) bytes.
"""

# ruff: noqa: ANN001, ANN201, ANN202, E741, RUF005 (Triton compiles these functions: an annotation would mean a constant,
# and tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator, var-annotated"
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST_SUM = tl.constexpr(2.0**-80)
HIGHEST_SUM = tl.constexpr(2.0**80)
LENGTHS = ("R", "H", "LQ", "LK")


def strides_of(*names: str) -> tuple[str, ...]:
    """Argument names of the batch, row, head and token strides of the named tensors."""
    return tuple(f"{n}_{axis}" for n in names for axis in ("b", "r", "h", "l"))


@triton.jit
def tile_pointers(base, tokens, stride, d, WIDE: tl.constexpr):
    """Pointers [tokens, d] for a token stride given in units of 8 elements."""
    offset = tokens.to(tl.int64) if WIDE else tokens
    return base + (offset * stride * 8)[:, None] + d[None, :]


@triton.jit
def powers(x, EXACT: tl.constexpr):
    """exp of scores, which are in log2 units, or in natural units when EXACT.

    Log2 units save a multiplication; natural ones, for fp32, round the large terms as the definition does.
    """
    return tl.math.exp2(x * LOG2E if EXACT else x)


@triton.jit
def load_bias(base, i, j, stride, LI, LJ, EXACT: tl.constexpr):
    """Tile [i, j] of one head's bias, j contiguous, zero outside; fp32 in the units of `powers`.

    The limit of j is rounded up to 8, to which the host pads, so that loads stay 16 bytes wide.
    """
    inside = (i < LI)[:, None] & (j < tl.cdiv(LJ, 8) * 8)[None, :]
    tile = tl.load(base + (i * stride * 8)[:, None] + j[None, :], mask=inside, other=0.0).to(tl.float32)
    return tile if EXACT else tile * LOG2E


@triton.jit
def keep_keys(KEEP, row, k, LK, HAS_MASK: tl.constexpr):
    """Which keys count: in range and not masked."""
    keep = k < LK
    if HAS_MASK:
        keep = tl.load(KEEP + row + k, mask=keep, other=0) != 0
    return keep


@triton.jit
def key_weights(WEIGHTS, row, k, LK, HAS_MASK: tl.constexpr):
    """1.0 for keys that count, else 0.0; fp32, zero up to the end of the last tile, so that no test is needed."""
    if HAS_MASK:
        return tl.load(WEIGHTS + row * 8 + k)
    return (k < LK).to(tl.float32)


@triton.jit
def _online_row(
    q, kb, vb, bb, KEEP, keep_row, qi, d, LQ, LK, k_l, v_l, bias_s, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One row with a running maximum: (accumulator, sum, maximum in the units of `powers`)."""
    acc = tl.zeros((BQ, BLOCK_D), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    top = tl.full((BQ,), float("-inf"), tl.float32)
    for k0 in tl.range(0, LK, BK, num_stages=STAGES):
        ki = k0 + tl.arange(0, BK)
        keep = keep_keys(KEEP, keep_row, ki, LK, HAS_MASK)
        inside = keep[:, None] & (d < D)[None, :]
        bias = load_bias(bb, qi, ki, bias_s, LQ, LK, EXACT)
        k = tl.load(tile_pointers(kb, ki, k_l, d, WIDE), mask=inside, other=0.0)
        v = tl.load(tile_pointers(vb, ki, v_l, d, WIDE), mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit_scale + bias
        s = tl.where(keep[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = powers(s - shift[:, None], EXACT)
        alpha = powers(top - shift, EXACT)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _any_key(KEEP, keep_row, LK, HAS_MASK: tl.constexpr):
    """1 when the row keeps at least one key."""
    found = 1
    if HAS_MASK:
        found = 0
        for k0 in range(0, LK, 1024):
            keep = keep_keys(KEEP, keep_row, k0 + tl.arange(0, 1024), LK, True)
            found = max(found, tl.max(keep.to(tl.int32)))
    return found


@triton.jit(
    do_not_specialize=[
        *LENGTHS,
        *strides_of("q", "k", "v", "o"),
        "bias_b",
        "bias_h",
        "bias_s",
        "keep_b",
        "keep_r",
        "weights_b",
        "weights_r",
    ]
)
def forward_kernel(
    Q, K, V, BIAS, KEEP, WEIGHTS, O, LSE, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, o_b, o_r, o_h, o_l,
    bias_b, bias_h, bias_s, keep_b, keep_r, weights_b, weights_r, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strides are in units of 8 elements, except `keep_*` (bytes). WEIGHTS is KEEP as fp32 0 and 1. LSE is contiguous [B, R, H, LQ]."""
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LQ, BQ)
    groups = tl.cdiv(R, ROWS)
    first = (pid // tiles) % groups * ROWS
    h = (pid // tiles // groups) % H
    b = pid // tiles // groups // H
    qi = (pid % tiles).to(tl.int32) * BQ + tl.arange(0, BQ)
    d = tl.arange(0, BLOCK_D)
    q_mask = (qi < LQ)[:, None] & (d < D)[None, :]
    bb = BIAS + (b * bias_b + h * bias_h) * 8

    qs = ()
    kbs = ()
    vbs = ()
    accs = ()
    totals = ()
    keep_rows = ()
    weight_rows = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        qb = Q + (b * q_b + row * q_r + h * q_h) * 8
        qs = qs + (tl.load(tile_pointers(qb, qi, q_l, d, WIDE), mask=q_mask, other=0.0),)
        kbs = kbs + (K + (b * k_b + row * k_r + h * k_h) * 8,)
        vbs = vbs + (V + (b * v_b + row * v_r + h * v_h) * 8,)
        keep_rows = keep_rows + (b * keep_b + row * keep_r,)
        weight_rows = weight_rows + (b * weights_b + row * weights_r,)
        accs = accs + (tl.zeros((BQ, BLOCK_D), tl.float32),)
        totals = totals + (tl.zeros((BQ,), tl.float32),)

    if FAST:
        for k0 in tl.range(0, LK, BK, num_stages=STAGES):
            ki = k0 + tl.arange(0, BK)
            bias = load_bias(bb, qi, ki, bias_s, LQ, LK, EXACT)
            new_accs = ()
            new_totals = ()
            for i in tl.static_range(ROWS):
                keep = keep_keys(KEEP, keep_rows[i], ki, LK, HAS_MASK)
                weight = key_weights(WEIGHTS, weight_rows[i], ki, LK, HAS_MASK)
                inside = keep[:, None] & (d < D)[None, :]
                k = tl.load(tile_pointers(kbs[i], ki, k_l, d, WIDE), mask=inside, other=0.0)
                v = tl.load(tile_pointers(vbs[i], ki, v_l, d, WIDE), mask=inside, other=0.0)
                p = powers(tl.dot(qs[i], tl.trans(k), input_precision=PRECISION) * unit_scale + bias, EXACT)
                new_totals = new_totals + (totals[i] + tl.sum(p * weight[None, :], 1),)
                new_accs = new_accs + (tl.dot(p.to(v.dtype), v, accs[i], input_precision=PRECISION),)
            accs = new_accs
            totals = new_totals

    for i in tl.static_range(ROWS):
        row = first + i
        acc = accs[i]
        total = totals[i]
        top = tl.zeros((BQ,), tl.float32)
        again = 1
        if FAST:
            sound = (total > LOWEST_SUM) & (total < HIGHEST_SUM) & (tl.abs(tl.sum(acc, 1)) < float("inf"))
            again = tl.max((~sound & (qi < LQ)).to(tl.int32))
        if again != 0:
            if _any_key(KEEP, keep_rows[i], LK, HAS_MASK) != 0:
                acc, total, top = _online_row(
                    qs[i], kbs[i], vbs[i], bb, KEEP, keep_rows[i], qi, d, LQ, LK, k_l, v_l, bias_s, unit_scale,
                    HAS_MASK, D, BQ, BK, BLOCK_D, PRECISION, WIDE, 1 if FAST else STAGES, EXACT,
                )  # fmt: skip
            else:
                acc = tl.zeros((BQ, BLOCK_D), tl.float32)
                total = tl.zeros((BQ,), tl.float32)
        inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
        ob = O + (b * o_b + row * o_r + h * o_h) * 8
        out = (acc * inverse[:, None]).to(O.dtype.element_ty)
        tl.store(tile_pointers(ob, qi, o_l, d, WIDE), out, mask=q_mask & (row < R))
        highest = top if EXACT else top * LN2
        lse = tl.where(total == 0.0, float("-inf"), highest + tl.math.log2(total) * LN2)
        tl.store(LSE + ((b * R + row) * H + h) * LQ + qi, lse, mask=(qi < LQ) & (row < R))
