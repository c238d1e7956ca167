"""Backward kernels of attention with a shared pair bias: every gradient has one owner, nothing is added atomically.

With p = exp(s - lse), delta = sum_d do * o and ds = p * (do v^T - delta):

    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k,   dbias[h,q,k] = sum over rows r of ds[r,h,q,k]

Kernels rebuild p from q, k, bias and lse:

- `grad_kv_kernel` owns a key tile of ROWS rows and runs over queries (4 products per tile, 1 exponential);
- `grad_q_kernel` owns a query tile of ROWS rows and runs over keys (3 products, 1 exponential). It can also write the
  sum of ds over its rows, one plane of dbias for every group of ROWS rows, which `folding` adds in order;
- `grad_bias_kernel` owns a (query, key) tile of one head and runs over rows, so that the bias tile and the sum
  over rows stay in registers (2 products, 1 exponential). It serves where planes are not written.

A plane is in the operands' dtype and in packed order, so that its values leave the registers where the products left
them. Rows come in as many chunks as keep the planes no larger than dk and dv. Traffic: for R rows and e bytes a value
e * H * Q * K * R / ROWS bytes written and read again. Each plane is rounded once, by 2**-9 of a sum of ROWS terms in
bf16, which adds to dbias about the error of its own rounding.

The rows are split over SPLITS programs of `grad_bias_kernel`, each with its own fp32 plane of dbias, folded in order.
Letting the bias kernel emit dq too, one plane per key tile, saves a reconstruction but was slower on an H200 (3.8
against 3.2 ms at 768 tokens): the planes cost more than the products.
"""

# ruff: noqa: ANN001, ANN201, E741, RUF005 (Triton compiles these functions: an annotation would mean a constant,
# and tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.attention.forward import (
    LENGTHS,
    LOG2E,
    head_of,
    in_units,
    multiply_add,
    powers,
    strides_of,
    tile_offsets,
    token,
)
from optimized.ops.attention.packing import (
    column_position,
    kept,
    load_bits,
    load_columns,
    load_packed,
    packed_head,
    packed_pointers,
    spread,
    store_packed,
    unpacked,
    value_pointers,
)
from optimized.ops.names import profiled_as

COMMON = (*LENGTHS, *strides_of("q", "k", "v", "g"))


@triton.jit
def statistics_row(b, row, h, R, H, LQ, TILE: tl.constexpr):
    """Start of one row and head in LSE2 and DELTA, [B, R, H, LQ rounded up to TILE]."""
    return ((b * R + row) * H + h) * (tl.cdiv(LQ, TILE) * TILE)


@triton.jit(
    repr=profiled_as("attention_statistics"), do_not_specialize=["R", "H", "LQ", *strides_of("o", "g")]
)
def statistics_kernel(
    O, G, LSE, DLSE, LSE2, DELTA, R, H, LQ, o_b, o_r, o_h, o_l, g_b, g_r, g_h, g_l,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """DELTA = sum over d of o * do, less the gradient of lse; LSE2 = -lse in the units of `powers`; both fp32, in
    the order of `column_position`.

    Padded queries and rows without keys get LSE2 = -inf, so that their probabilities vanish without a test. (It is
    added, not subtracted: the compiler negates what it loads as vectors by an instruction of its own.)
    """
    EXACT: tl.constexpr = O.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LQ, TILE)
    q0 = (pid // H % tiles).to(tl.int32) * TILE
    qi = q0 + tl.arange(0, TILE)
    h = pid % H
    row = pid // H // tiles % R
    b = pid // H // tiles // R
    d = tl.arange(0, BLOCK_D)
    inside = (qi < LQ)[:, None] & (d < D)[None, :]
    ob = token(head_of(O, b, row, h, o_b, o_r, o_h), q0, o_l)
    gb = token(head_of(G, b, row, h, g_b, g_r, g_h), q0, g_l)
    o = tl.load(ob + tile_offsets(o_l, d, TILE), mask=inside, other=0.0)
    g = tl.load(gb + tile_offsets(g_l, d, TILE), mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    source = ((b * R + row) * H + h) * LQ + qi
    lse = tl.load(LSE + source, mask=qi < LQ, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(DLSE + source, mask=qi < LQ, other=0.0)
    target = statistics_row(b, row, h, R, H, LQ, TILE) + column_position(qi)
    tl.store(LSE2 + target, tl.where(lse == float("-inf"), lse, -lse if EXACT else lse * -LOG2E))
    tl.store(DELTA + target, delta)


@triton.jit(
    repr=profiled_as("attention_grad_kv"),
    do_not_specialize=[*COMMON, "mask_b", "mask_r", *strides_of("dk", "dv")],
)
def grad_kv_kernel(
    Q, K, V, G, FLIPPED, MASK, LSE2, DELTA, DK, DV, R, H, LQ, LK,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l,
    dk_b, dk_r, dk_h, dk_l, dv_b, dv_r, dv_h, dv_l, mask_b, mask_r, scale, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a key tile for ROWS rows. Scores are built transposed, [k, q], so that p^T feeds the products;
    FLIPPED is the packed transposed bias.

    A masked key touches only its own row of dk and dv here: those rows are zeroed at the end.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    TYPE: tl.constexpr = FLIPPED.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LK, BK)
    groups = tl.cdiv(R, ROWS)
    first = (pid // tiles) % groups * ROWS
    h = (pid // tiles // groups) % H
    b = pid // tiles // groups // H
    k0 = (pid % tiles).to(tl.int32) * BK
    ki = k0 + tl.arange(0, BK)
    d = tl.arange(0, BLOCK_D)
    k_mask = (ki < LK)[:, None] & (d < D)[None, :]
    q_offsets = tile_offsets(q_l, d, BQ)
    g_offsets = tile_offsets(g_l, d, BQ)
    q_blocks = tl.cdiv(LQ, TILE) * (TILE // 16)
    pointers = packed_pointers(packed_head(FLIPPED, b, h, H, LK, LQ, TILE), k0 // BK, q_blocks, BK)

    ks = ()
    vs = ()
    dks = ()
    dvs = ()
    qbs = ()
    gbs = ()
    stats = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        kb = token(head_of(K, b, row, h, k_b, k_r, k_h), k0, k_l)
        vb = token(head_of(V, b, row, h, v_b, v_r, v_h), k0, v_l)
        ks = ks + (tl.load(kb + tile_offsets(k_l, d, BK), mask=k_mask, other=0.0),)
        vs = vs + (tl.load(vb + tile_offsets(v_l, d, BK), mask=k_mask, other=0.0),)
        dks = dks + (tl.zeros((BK, BLOCK_D), tl.float32),)
        dvs = dvs + (tl.zeros((BK, BLOCK_D), tl.float32),)
        qbs = qbs + (head_of(Q, b, row, h, q_b, q_r, q_h),)
        gbs = gbs + (head_of(G, b, row, h, g_b, g_r, g_h),)
        stats = stats + (statistics_row(b, row, h, R, H, LQ, TILE),)

    last = q_blocks // (BQ // 16) - 1
    raw = load_packed(pointers, 0, BQ)
    raw_lses = ()
    raw_deltas = ()
    for i in tl.static_range(ROWS):
        raw_lses = raw_lses + (load_columns(LSE2 + stats[i], 0, BK, BQ),)
        raw_deltas = raw_deltas + (load_columns(DELTA + stats[i], 0, BK, BQ),)
    for q0 in tl.range(0, LQ, BQ, num_stages=STAGES):
        inside = (q0 + tl.arange(0, BQ) < LQ)[:, None] & (d < D)[None, :]
        bias = in_units(unpacked(raw, BK, BQ, TYPE), EXACT)
        ahead = tl.minimum(q0 // BQ + 1, last)
        new_lses = ()
        new_deltas = ()
        new_dks = ()
        new_qbs = ()
        new_gbs = ()
        new_dvs = ()
        for i in tl.static_range(ROWS):
            lse = spread(raw_lses[i], BK, BQ)
            delta = spread(raw_deltas[i], BK, BQ)
            q = tl.load(qbs[i] + q_offsets, mask=inside, other=0.0)
            g = tl.load(gbs[i] + g_offsets, mask=inside, other=0.0)
            new_qbs = new_qbs + (token(qbs[i], BQ, q_l),)
            new_gbs = new_gbs + (token(gbs[i], BQ, g_l),)
            s = tl.dot(ks[i], tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(vs[i], tl.trans(g), input_precision=PRECISION)
            if EXACT:
                p = powers(s * unit_scale + bias + lse, True)
            else:
                p = powers(s * unit_scale + (bias + lse), False)
            new_dvs = new_dvs + (multiply_add(p.to(g.dtype), g, dvs[i], PRECISION),)
            ds = p * (dp - delta)
            new_dks = new_dks + (multiply_add(ds.to(q.dtype), q, dks[i], PRECISION),)
            # Not before: their registers are those of the values in use.
            new_lses = new_lses + (load_columns(LSE2 + stats[i], ahead * BQ, BK, BQ),)
            new_deltas = new_deltas + (load_columns(DELTA + stats[i], ahead * BQ, BK, BQ),)
        raw = load_packed(pointers, ahead, BQ)
        dks = new_dks
        qbs = new_qbs
        gbs = new_gbs
        dvs = new_dvs
        raw_lses = new_lses
        raw_deltas = new_deltas

    for i in tl.static_range(ROWS):
        row = first + i
        mask_at = (b * mask_b + tl.minimum(row, R - 1) * mask_r) * 8
        stored = k_mask & (row < R)
        dk = dks[i] * scale
        dv = dvs[i]  # type: ignore
        if HAS_MASK:
            keep = tl.load(MASK + mask_at + column_position(ki)) == 0.0
            dk = tl.where(keep[:, None], dk, 0.0)
            dv = tl.where(keep[:, None], dv, 0.0)
        dk_base = token(head_of(DK, b, row, h, dk_b, dk_r, dk_h), k0, dk_l)
        dv_base = token(head_of(DV, b, row, h, dv_b, dv_r, dv_h), k0, dv_l)
        tl.store(dk_base + tile_offsets(dk_l, d, BK), dk.to(DK.dtype.element_ty), mask=stored)
        tl.store(dv_base + tile_offsets(dv_l, d, BK), dv.to(DV.dtype.element_ty), mask=stored)


@triton.jit(
    repr=profiled_as("attention_grad_q"),
    do_not_specialize=[*COMMON, "start", "groups", *strides_of("dq")],
)
def grad_q_kernel(
    Q, K, V, G, BIAS, BITS, LSE2, DELTA, DQ, PLANES, R, H, LQ, LK, start, groups,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l, dq_b, dq_r, dq_h, dq_l,
    scale, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a query tile for ROWS rows, running over keys; the rows are `groups` times ROWS from row `start` on.

    With SUMS, the sum of ds over the ROWS rows goes to PLANES [B, groups, H, packed LQ x LK], rounded to their dtype.
    """
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    TYPE: tl.constexpr = BIAS.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(LQ, BQ)
    group = (pid // tiles) % groups
    first = start + group * ROWS
    h = (pid // tiles // groups) % H
    b = pid // tiles // groups // H
    q0 = (pid % tiles).to(tl.int32) * BQ
    qi = q0 + tl.arange(0, BQ)
    d = tl.arange(0, BLOCK_D)
    q_mask = (qi < LQ)[:, None] & (d < D)[None, :]
    k_offsets = tile_offsets(k_l, d, BK)
    v_offsets = tile_offsets(v_l, d, BK)
    k_blocks = tl.cdiv(LK, TILE) * (TILE // 16)
    pointers = packed_pointers(packed_head(BIAS, b, h, H, LQ, LK, TILE), q0 // BQ, k_blocks, BQ)
    if SUMS:
        plane = packed_head(PLANES, b * groups + group, h, H, LQ, LK, TILE)
        targets = value_pointers(plane, q0 // BQ, k_blocks, BQ)

    qs = ()
    gs = ()
    lses = ()
    deltas = ()
    dqs = ()
    kbs = ()
    vbs = ()
    bits_at = ()
    for i in tl.static_range(ROWS):
        row = tl.minimum(first + i, R - 1)
        qb = token(head_of(Q, b, row, h, q_b, q_r, q_h), q0, q_l)
        gb = token(head_of(G, b, row, h, g_b, g_r, g_h), q0, g_l)
        qs = qs + (tl.load(qb + tile_offsets(q_l, d, BQ), mask=q_mask, other=0.0),)
        gs = gs + (tl.load(gb + tile_offsets(g_l, d, BQ), mask=q_mask, other=0.0),)
        stats = statistics_row(b, row, h, R, H, LQ, TILE) + column_position(qi)
        lse = tl.load(LSE2 + stats)
        # A row past the last is the last again, for the loads' sake: without probabilities it adds nothing.
        lses = lses + (tl.where(first + i < R, lse, float("-inf")) if SUMS else lse,)
        deltas = deltas + (tl.load(DELTA + stats),)
        dqs = dqs + (tl.zeros((BQ, BLOCK_D), tl.float32),)
        kbs = kbs + (head_of(K, b, row, h, k_b, k_r, k_h),)
        vbs = vbs + (head_of(V, b, row, h, v_b, v_r, v_h),)
        bits_at = bits_at + ((b * R + row) * (k_blocks if HAS_MASK else 0),)

    last = k_blocks // (BK // 16) - 1
    raw = load_packed(pointers, 0, BK)
    bits = ()
    for i in tl.static_range(ROWS):
        bits = bits + (load_bits(BITS + bits_at[i], 0, BK) if HAS_MASK else 0,)
    for k0 in tl.range(0, LK, BK, num_stages=STAGES):
        inside = (k0 + tl.arange(0, BK) < LK)[:, None] & (d < D)[None, :]
        bias = in_units(unpacked(raw, BQ, BK, TYPE), EXACT)
        ahead = tl.minimum(k0 // BK + 1, last)
        new_bits = ()
        new_kbs = ()
        new_vbs = ()
        new_dqs = ()
        total = tl.zeros((BQ, BK), tl.float32)
        for i in tl.static_range(ROWS):
            k = tl.load(kbs[i] + k_offsets, mask=inside, other=0.0)
            v = tl.load(vbs[i] + v_offsets, mask=inside, other=0.0)
            new_kbs = new_kbs + (token(kbs[i], BK, k_l),)
            new_vbs = new_vbs + (token(vbs[i], BK, v_l),)
            s = tl.dot(qs[i], tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(gs[i], tl.trans(v), input_precision=PRECISION)
            s = (
                s * unit_scale + bias + lses[i][:, None]
                if EXACT
                else s * unit_scale + (bias + lses[i][:, None])
            )
            if HAS_MASK:
                s = tl.where(kept(bits[i], BK)[None, :], s, float("-inf"))
                new_bits = new_bits + (load_bits(BITS + bits_at[i], ahead * BK, BK),)
            else:
                new_bits = new_bits + (0,)
            ds = powers(s, EXACT) * (dp - deltas[i][:, None])
            if SUMS:
                total = ds if i == 0 else total + ds
            new_dqs = new_dqs + (multiply_add(ds.to(k.dtype), k, dqs[i], PRECISION),)
        raw = load_packed(pointers, ahead, BK)  # not before: its registers are those of the bias in use
        if SUMS:
            store_packed(targets, k0 // BK, total, BQ, BK)
        dqs = new_dqs
        kbs = new_kbs
        vbs = new_vbs
        bits = new_bits

    for i in tl.static_range(ROWS):
        row = first + i
        base = token(head_of(DQ, b, row, h, dq_b, dq_r, dq_h), q0, dq_l)
        dq = (dqs[i] * scale).to(DQ.dtype.element_ty)
        tl.store(base + tile_offsets(dq_l, d, BQ), dq, mask=q_mask & (row < R))


@triton.jit(
    repr=profiled_as("attention_grad_bias"),
    do_not_specialize=[*COMMON, "batches", "mask_b", "mask_r", "splits"],
)
def grad_bias_kernel(
    Q, K, V, G, BIAS, MASK, LSE2, DELTA, DBIAS, R, H, LQ, LK, splits, batches,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l, mask_b, mask_r, unit_scale,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Plane `split` of dbias, DBIAS [splits, B, H, LQ, LK] fp32 contiguous, over this split's share of the rows."""
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    TYPE: tl.constexpr = BIAS.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(LQ, BQ)
    k_tiles = tl.cdiv(LK, BK)
    q0 = (pid // k_tiles % q_tiles).to(tl.int32) * BQ
    k0 = (pid % k_tiles).to(tl.int32) * BK
    qi = q0 + tl.arange(0, BQ)
    ki = k0 + tl.arange(0, BK)
    h = pid // k_tiles // q_tiles % H
    split = pid // k_tiles // q_tiles // H % splits
    b = pid // k_tiles // q_tiles // H // splits
    d = tl.arange(0, BLOCK_D)
    q_mask = (qi < LQ)[:, None] & (d < D)[None, :]
    k_mask = (ki < LK)[:, None] & (d < D)[None, :]
    q_offsets = tile_offsets(q_l, d, BQ)
    k_offsets = tile_offsets(k_l, d, BK)
    v_offsets = tile_offsets(v_l, d, BK)
    g_offsets = tile_offsets(g_l, d, BQ)
    k_blocks = tl.cdiv(LK, TILE) * (TILE // 16)
    pointers = packed_pointers(packed_head(BIAS, b, h, H, LQ, LK, TILE), q0 // BQ, k_blocks, BQ)
    bias = in_units(unpacked(load_packed(pointers, k0 // BK, BK), BQ, BK, TYPE), EXACT)
    total = tl.zeros((BQ, BK), tl.float32)
    share = tl.cdiv(R, splits)
    begin = split.to(tl.int32) * share
    end = tl.minimum(begin + share, R)
    q_base = token(head_of(Q, b, 0, h, q_b, q_r, q_h), q0, q_l)
    k_base = token(head_of(K, b, 0, h, k_b, k_r, k_h), k0, k_l)
    v_base = token(head_of(V, b, 0, h, v_b, v_r, v_h), k0, v_l)
    g_base = token(head_of(G, b, 0, h, g_b, g_r, g_h), q0, g_l)
    mask_head = MASK + b * mask_b * 8 + k0
    raw_mask = load_columns(mask_head, tl.minimum(begin, R - 1) * (mask_r * 8), BQ, BK) if HAS_MASK else 0
    for row in tl.range(begin, end, num_stages=STAGES):
        q = tl.load(token(q_base, row, q_r) + q_offsets, mask=q_mask, other=0.0)
        k = tl.load(token(k_base, row, k_r) + k_offsets, mask=k_mask, other=0.0)
        v = tl.load(token(v_base, row, v_r) + v_offsets, mask=k_mask, other=0.0)
        g = tl.load(token(g_base, row, g_r) + g_offsets, mask=q_mask, other=0.0)
        stats = statistics_row(b, row, h, R, H, LQ, TILE)
        lse = tl.load(LSE2 + stats + column_position(qi))
        delta = tl.load(DELTA + stats + column_position(qi))
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        s = s * unit_scale + bias + lse[:, None] if EXACT else s * unit_scale + (bias + lse[:, None])
        if HAS_MASK:
            s += spread(raw_mask, BQ, BK)
            raw_mask = load_columns(mask_head, tl.minimum(row + 1, R - 1) * (mask_r * 8), BQ, BK)
        total += powers(s, EXACT) * (dp - delta[:, None])

    plane = DBIAS + (((split * batches + b) * H + h) * LQ + q0) * LK
    target = plane + (tl.arange(0, BQ).to(tl.int64) * LK)[:, None] + ki[None, :]
    tl.store(target, total, mask=(qi < LQ)[:, None] & (ki < LK)[None, :])
