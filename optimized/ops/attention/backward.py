"""Backward kernels of attention with a shared pair bias: every gradient has one owner, nothing is added atomically.

With p = exp(s - lse), delta = sum_d do * o and ds = p * (do v^T - delta):

    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k,   dbias[h,q,k] = sum over rows r of ds[r,h,q,k]

Three kernels rebuild p from q, k, bias and lse:

- `grad_kv_kernel` owns a key tile of ROWS rows and runs over queries (4 products per tile, 1 exponential);
- `grad_bias_kernel` owns a (query, key) tile of one head and runs over rows, so that the bias tile and the sum
  over rows stay in registers (2 products, 1 exponential). With EMIT_DQ it also writes its share of dq, one plane per
  key tile, which `fold_kernel` adds in a fixed order (3 products);
- `grad_q_kernel` owns a query tile of ROWS rows and runs over keys (3 products, 1 exponential), used without EMIT_DQ.

The rows are split over SPLITS programs of `grad_bias_kernel`, each with its own fp32 plane of dbias, folded in order.
"""

# ruff: noqa: ANN001, ANN201, E741, RUF005 (Triton compiles these functions: an annotation would mean a constant,
# and tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.attention.forward import (
    LENGTHS,
    LOG2E,
    keep_keys,
    key_weights,
    load_bias,
    powers,
    strides_of,
    tile_pointers,
)

COMMON = (*LENGTHS, *strides_of("q", "k", "v", "g"), "bias_b", "bias_h", "bias_s")


@triton.jit
def statistics_row(b, row, h, R, H, LQ):
    """Start of one row and head in LSE2 and DELTA, [B, R, H, LQ rounded up to 128]."""
    return ((b * R + row) * H + h) * (tl.cdiv(LQ, 128) * 128)


@triton.jit(do_not_specialize=["R", "H", "LQ", *strides_of("o", "g")])
def statistics_kernel(
    O, G, LSE, DLSE, LSE2, DELTA, R, H, LQ, o_b, o_r, o_h, o_l, g_b, g_r, g_h, g_l,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """DELTA = sum over d of o * do, less the gradient of lse; LSE2 = lse in the units of `powers`; both fp32.

    Padded queries and rows without keys get LSE2 = +inf, so that their probabilities vanish without a test.
    """
    EXACT: tl.constexpr = O.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LQ, BQ)
    qi = (pid // H % tiles).to(tl.int32) * BQ + tl.arange(0, BQ)
    h = pid % H
    row = pid // H // tiles % R
    b = pid // H // tiles // R
    d = tl.arange(0, BLOCK_D)
    inside = (qi < LQ)[:, None] & (d < D)[None, :]
    o = tl.load(
        tile_pointers(O + (b * o_b + row * o_r + h * o_h) * 8, qi, o_l, d, WIDE), mask=inside, other=0.0
    )
    g = tl.load(
        tile_pointers(G + (b * g_b + row * g_r + h * g_h) * 8, qi, g_l, d, WIDE), mask=inside, other=0.0
    )
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    source = ((b * R + row) * H + h) * LQ + qi
    lse = tl.load(LSE + source, mask=qi < LQ, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(DLSE + source, mask=qi < LQ, other=0.0)
    target = statistics_row(b, row, h, R, H, LQ) + qi
    tl.store(LSE2 + target, tl.where(lse == float("-inf"), float("inf"), lse if EXACT else lse * LOG2E))
    tl.store(DELTA + target, delta)


@triton.jit(do_not_specialize=[*COMMON, "keep_b", "keep_r", *strides_of("dk", "dv")])
def grad_kv_kernel(
    Q, K, V, G, BIAS, KEEP, LSE2, DELTA, DK, DV, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l,
    dk_b, dk_r, dk_h, dk_l, dv_b, dv_r, dv_h, dv_l,
    bias_b, bias_h, bias_s, keep_b, keep_r, scale, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a key tile for ROWS rows. Scores are built transposed, [k, q], so that p^T feeds the products;
    BIAS is [B, H, K, Q] here, queries contiguous.

    A masked key touches only its own row of dk and dv here: those rows are zeroed at the end.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LK, BK)
    groups = tl.cdiv(R, ROWS)
    first = (pid // tiles) % groups * ROWS
    h = (pid // tiles // groups) % H
    b = pid // tiles // groups // H
    ki = (pid % tiles).to(tl.int32) * BK + tl.arange(0, BK)
    d = tl.arange(0, BLOCK_D)
    k_mask = (ki < LK)[:, None] & (d < D)[None, :]
    bb = BIAS + (b * bias_b + h * bias_h) * 8

    ks = ()
    vs = ()
    dks = ()
    dvs = ()
    qbs = ()
    gbs = ()
    stats = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        kb = K + (b * k_b + row * k_r + h * k_h) * 8
        vb = V + (b * v_b + row * v_r + h * v_h) * 8
        ks = ks + (tl.load(tile_pointers(kb, ki, k_l, d, WIDE), mask=k_mask, other=0.0),)
        vs = vs + (tl.load(tile_pointers(vb, ki, v_l, d, WIDE), mask=k_mask, other=0.0),)
        dks = dks + (tl.zeros((BK, BLOCK_D), tl.float32),)
        dvs = dvs + (tl.zeros((BK, BLOCK_D), tl.float32),)
        qbs = qbs + (Q + (b * q_b + row * q_r + h * q_h) * 8,)
        gbs = gbs + (G + (b * g_b + row * g_r + h * g_h) * 8,)
        stats = stats + (statistics_row(b, row, h, R, H, LQ),)

    for q0 in tl.range(0, LQ, BQ, num_stages=STAGES):
        qi = q0 + tl.arange(0, BQ)
        inside = (qi < LQ)[:, None] & (d < D)[None, :]
        bias = load_bias(bb, ki, qi, bias_s, LK, LQ, EXACT)
        new_dks = ()
        new_dvs = ()
        for i in tl.static_range(ROWS):
            lse = tl.load(LSE2 + stats[i] + qi)
            delta = tl.load(DELTA + stats[i] + qi)
            q = tl.load(tile_pointers(qbs[i], qi, q_l, d, WIDE), mask=inside, other=0.0)
            g = tl.load(tile_pointers(gbs[i], qi, g_l, d, WIDE), mask=inside, other=0.0)
            s = tl.dot(ks[i], tl.trans(q), input_precision=PRECISION) * unit_scale + bias - lse[None, :]
            dp = tl.dot(vs[i], tl.trans(g), input_precision=PRECISION)
            p = powers(s, EXACT)
            new_dvs = new_dvs + (tl.dot(p.to(g.dtype), g, dvs[i], input_precision=PRECISION),)
            ds = p * (dp - delta[None, :])
            new_dks = new_dks + (tl.dot(ds.to(q.dtype), q, dks[i], input_precision=PRECISION),)
        dks = new_dks
        dvs = new_dvs

    for i in tl.static_range(ROWS):
        row = first + i
        keep = keep_keys(KEEP, b * keep_b + tl.minimum(row, R - 1) * keep_r, ki, LK, HAS_MASK)
        stored = k_mask & (row < R)
        dk = tl.where(keep[:, None], dks[i] * scale, 0.0).to(DK.dtype.element_ty)
        dv = tl.where(keep[:, None], dvs[i], 0.0).to(DV.dtype.element_ty)
        dk_base = DK + (b * dk_b + row * dk_r + h * dk_h) * 8
        dv_base = DV + (b * dv_b + row * dv_r + h * dv_h) * 8
        tl.store(tile_pointers(dk_base, ki, dk_l, d, WIDE), dk, mask=stored)
        tl.store(tile_pointers(dv_base, ki, dv_l, d, WIDE), dv, mask=stored)


@triton.jit(do_not_specialize=[*COMMON, "weights_b", "weights_r", *strides_of("dq")])
def grad_q_kernel(
    Q, K, V, G, BIAS, WEIGHTS, LSE2, DELTA, DQ, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l, dq_b, dq_r, dq_h, dq_l,
    bias_b, bias_h, bias_s, weights_b, weights_r, scale, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a query tile for ROWS rows, running over keys."""
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
    gs = ()
    lses = ()
    deltas = ()
    dqs = ()
    kbs = ()
    vbs = ()
    weight_rows = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        qb = Q + (b * q_b + row * q_r + h * q_h) * 8
        gb = G + (b * g_b + row * g_r + h * g_h) * 8
        qs = qs + (tl.load(tile_pointers(qb, qi, q_l, d, WIDE), mask=q_mask, other=0.0),)
        gs = gs + (tl.load(tile_pointers(gb, qi, g_l, d, WIDE), mask=q_mask, other=0.0),)
        stats = statistics_row(b, row, h, R, H, LQ) + qi
        lses = lses + (tl.load(LSE2 + stats),)
        deltas = deltas + (tl.load(DELTA + stats),)
        dqs = dqs + (tl.zeros((BQ, BLOCK_D), tl.float32),)
        kbs = kbs + (K + (b * k_b + row * k_r + h * k_h) * 8,)
        vbs = vbs + (V + (b * v_b + row * v_r + h * v_h) * 8,)
        weight_rows = weight_rows + (b * weights_b + row * weights_r,)

    for k0 in tl.range(0, LK, BK, num_stages=STAGES):
        ki = k0 + tl.arange(0, BK)
        bias = load_bias(bb, qi, ki, bias_s, LQ, LK, EXACT)
        inside = (ki < LK)[:, None] & (d < D)[None, :]
        new_dqs = ()
        for i in tl.static_range(ROWS):
            weight = key_weights(WEIGHTS, weight_rows[i], ki, LK, HAS_MASK)
            k = tl.load(tile_pointers(kbs[i], ki, k_l, d, WIDE), mask=inside, other=0.0)
            v = tl.load(tile_pointers(vbs[i], ki, v_l, d, WIDE), mask=inside, other=0.0)
            s = tl.dot(qs[i], tl.trans(k), input_precision=PRECISION) * unit_scale + bias - lses[i][:, None]
            dp = tl.dot(gs[i], tl.trans(v), input_precision=PRECISION)
            p = tl.where(weight[None, :] != 0.0, powers(s, EXACT), 0.0)
            ds = p * (dp - deltas[i][:, None])
            new_dqs = new_dqs + (tl.dot(ds.to(k.dtype), k, dqs[i], input_precision=PRECISION),)
        dqs = new_dqs

    for i in tl.static_range(ROWS):
        row = first + i
        base = DQ + (b * dq_b + row * dq_r + h * dq_h) * 8
        dq = (dqs[i] * scale).to(DQ.dtype.element_ty)
        tl.store(tile_pointers(base, qi, dq_l, d, WIDE), dq, mask=q_mask & (row < R))


@triton.jit(do_not_specialize=[*COMMON, "weights_r", "part_plane", "splits", "row_start", "row_stop"])
def grad_bias_kernel(
    Q, K, V, G, BIAS, WEIGHTS, LSE2, DELTA, DBIAS, PARTS, R, H, LQ, LK, splits, row_start, row_stop, part_plane,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l,
    bias_b, bias_h, bias_s, weights_b, weights_r, scale, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, EMIT_DQ: tl.constexpr, ACCUMULATE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Plane `split` of dbias, DBIAS [splits, H, LQ, LK] fp32 contiguous, over this split's share of the rows.

    Works on one batch entry (batch strides are not used). With EMIT_DQ also plane `key tile` of dq for these rows:
    PARTS [key tiles, rows, LQ, H, D] contiguous, `part_plane` elements a plane, rows counted from row_start, times
    `scale`. ACCUMULATE adds to what DBIAS holds from earlier rows.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(LQ, BQ)
    k_tiles = tl.cdiv(LK, BK)
    k_tile = pid % k_tiles
    qi = (pid // k_tiles % q_tiles).to(tl.int32) * BQ + tl.arange(0, BQ)
    h = pid // k_tiles // q_tiles % H
    split = pid // k_tiles // q_tiles // H
    ki = k_tile.to(tl.int32) * BK + tl.arange(0, BK)
    d = tl.arange(0, BLOCK_D)
    q_mask = (qi < LQ)[:, None] & (d < D)[None, :]
    k_mask = (ki < LK)[:, None] & (d < D)[None, :]
    bias = load_bias(BIAS + h * bias_h * 8, qi, ki, bias_s, LQ, LK, EXACT)
    total = tl.zeros((BQ, BK), tl.float32)
    wide_zero = tl.full((), 0, tl.int64)
    share = tl.cdiv(row_stop - row_start, splits)
    begin = row_start + split.to(tl.int32) * share
    end = tl.minimum(begin + share, row_stop)
    q_base = Q + h * q_h * 8
    k_base = K + h * k_h * 8
    v_base = V + h * v_h * 8
    g_base = G + h * g_h * 8
    for row in tl.range(begin, end, num_stages=STAGES):
        r = wide_zero + row
        q = tl.load(tile_pointers(q_base + r * q_r * 8, qi, q_l, d, WIDE), mask=q_mask, other=0.0)
        k = tl.load(tile_pointers(k_base + r * k_r * 8, ki, k_l, d, WIDE), mask=k_mask, other=0.0)
        v = tl.load(tile_pointers(v_base + r * v_r * 8, ki, v_l, d, WIDE), mask=k_mask, other=0.0)
        g = tl.load(tile_pointers(g_base + r * g_r * 8, qi, g_l, d, WIDE), mask=q_mask, other=0.0)
        stats = statistics_row(0, r, h, R, H, LQ) + qi
        lse = tl.load(LSE2 + stats)
        delta = tl.load(DELTA + stats)
        weight = key_weights(WEIGHTS, r * weights_r, ki, LK, HAS_MASK)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * unit_scale + bias - lse[:, None]
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        p = tl.where(weight[None, :] != 0.0, powers(s, EXACT), 0.0)
        ds = p * (dp - delta[:, None])
        total += ds
        if EMIT_DQ:
            part = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION) * scale
            line = ((r - row_start) * LQ + qi) * H + h
            target = PARTS + k_tile * part_plane + (line * D)[:, None] + d[None, :]
            tl.store(target, part.to(PARTS.dtype.element_ty), mask=q_mask)

    target = DBIAS + (((split * H + h) * LQ + qi) * LK)[:, None] + ki[None, :]
    inside = (qi < LQ)[:, None] & (ki < LK)[None, :]
    if ACCUMULATE:
        total += tl.load(target, mask=inside, other=0.0)
    tl.store(target, total, mask=inside)


@triton.jit(do_not_specialize=["planes", "size"])
def fold_kernel(PARTS, OUT, planes, size, BLOCK: tl.constexpr):
    """OUT[x] = sum over planes p, in order, of PARTS[p, x] in fp32; PARTS [planes, size], OUT [size]."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = x < size
    wide_size = tl.full((), 0, tl.int64) + size
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(planes):
        total += tl.load(PARTS + p * wide_size + x, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + x, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["planes", "lines", "H", "LQ", "dq_r", "dq_h", "dq_l"])
def fold_q_kernel(
    PARTS, DQ, planes, lines, H, LQ, dq_r, dq_h, dq_l, D: tl.constexpr, BLOCK_D: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """dq of `lines` = rows * LQ * H vectors: the planes of PARTS [planes, rows, LQ, H, D] added in order, in fp32."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    d = tl.arange(0, BLOCK_D)
    inside = (line < lines)[:, None] & (d < D)[None, :]
    at = PARTS + (line * D)[:, None] + d[None, :]
    plane = (tl.full((), 0, tl.int64) + lines) * D
    total = tl.zeros((LINES, BLOCK_D), tl.float32)
    for p in range(planes):
        total += tl.load(at + p * plane, mask=inside, other=0.0).to(tl.float32)
    offset = (line // H // LQ * dq_r + line // H % LQ * dq_l + line % H * dq_h) * 8
    tl.store(DQ + offset[:, None] + d[None, :], total.to(DQ.dtype.element_ty), mask=inside)
