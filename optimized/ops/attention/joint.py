"""All gradients of attention with a shared pair bias from one reconstruction of the probabilities.

`backward` rebuilds every probability twice, for dq and for dk and dv: 7 products and 2 exponentials a score. Here a
program keeps a key tile of ROWS rows, runs over the queries, and takes all of

    dv = p^T do,   dk = scale * ds^T q,   dq = scale * ds k,   plane = sum of ds over its ROWS rows

from one p and one ds: 5 products and 1 exponential. Every sum still has one owner and one order:

- a program owns a run of key tiles of its rows and adds its part of dq, tile after tile, to sums in fp32 that no other
  program touches, PARTS [splits, B, rows, H, LQ, D]. It stores the first tile's part and adds the others: an addition
  in the L2 cache for which nobody waits, in the order in which a thread makes them, since the same thread always has
  the same elements. The splits are added in order afterwards.
- planes of dbias are those of `backward.grad_q_kernel`, transposed, and folded in the same way.

What depends on the query alone comes in through the matrix unit: EXTRA [B, rows, H, LQ, 16] holds, in three pieces of
the operands' dtype each, what the scores and the products do v^T want added, -lse and -delta, and the constant 1, with
which the left operands mask their keys. As vectors in registers they would take 32 of them for a row and two
instructions a score.

Rows come in chunks: the planes of a chunk, its sums and its columns are the workspace. `joint_between_kernel` ends one
chunk and prepares the next.
"""

# ruff: noqa: ANN001, ANN201, ANN202, E741, RUF005 (Triton compiles these functions: an annotation would mean a constant,
# and tuples grow by addition)
# mypy: disable-error-code="no-untyped-def, no-any-return, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.attention.backward import COMMON, statistics_row
from optimized.ops.attention.folding import fold_planes
from optimized.ops.attention.forward import (
    LOG2E,
    head_of,
    multiply_add,
    powers,
    strides_of,
    tile_offsets,
    token,
)
from optimized.ops.attention.packing import (
    column_position,
    load_packed,
    packed_pointers,
    store_packed,
    unpacked,
    value_pointers,
)
from optimized.ops.names import profiled_as

COLUMNS = tl.constexpr(16)  # the depth of one step of the matrix unit
PIECES = tl.constexpr(3)  # of 8 bits each: the 24 of fp32
KEPT = tl.constexpr(6)  # the column of ones, after the pieces of lse and of delta


@triton.jit
def _pieces(x, TYPE: tl.constexpr):
    """`x` in fp32 as three numbers of TYPE that add up to it."""
    high = x.to(TYPE).to(tl.float32)
    middle = (x - high).to(TYPE).to(tl.float32)
    return high, middle, x - high - middle


@triton.jit
def _write_columns(
    pid, O, G, LSE, DLSE, EXTRA, R, H, LQ, start, rows, o_b, o_r, o_h, o_l, g_b, g_r, g_h, g_l, unit_scale, never,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program `pid` of those that write EXTRA of `rows` rows from row `start` on: -lse over the scale, and delta = sum
    over d of o * do, less the gradient of lse. Padded queries, rows without keys and rows past the last get `never`
    for -lse over the scale.
    """
    TYPE: tl.constexpr = EXTRA.dtype.element_ty
    tiles = tl.cdiv(LQ, TILE)
    q0 = (pid // H % tiles).to(tl.int32) * TILE
    qi = q0 + tl.arange(0, TILE)
    h = pid % H
    local = pid // H // tiles % rows
    row = start + local
    b = pid // H // tiles // rows
    d = tl.arange(0, BLOCK_D)
    real = (qi < LQ) & (row < R)
    inside = real[:, None] & (d < D)[None, :]
    ob = token(head_of(O, b, row, h, o_b, o_r, o_h), q0, o_l)
    gb = token(head_of(G, b, row, h, g_b, g_r, g_h), q0, g_l)
    o = tl.load(ob + tile_offsets(o_l, d, TILE), mask=inside, other=0.0)
    g = tl.load(gb + tile_offsets(g_l, d, TILE), mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    source = ((b * R + row) * H + h) * LQ + qi
    lse = tl.load(LSE + source, mask=real, other=float("-inf"))
    if HAS_DLSE:
        delta -= tl.load(DLSE + source, mask=real, other=0.0)
    shift = tl.where(lse == float("-inf"), never, lse * -LOG2E / unit_scale)
    s0, s1, s2 = _pieces(shift, TYPE)
    d0, d1, d2 = _pieces(delta, TYPE)
    c = tl.arange(0, COLUMNS)[None, :]
    one = tl.where((c == KEPT) & (qi >= 0)[:, None], 1.0, 0.0)
    first = tl.where(c == 0, s0[:, None], tl.where(c == 1, s1[:, None], tl.where(c == 2, s2[:, None], one)))
    tile = tl.where(c == 3, d0[:, None], tl.where(c == 4, d1[:, None], tl.where(c == 5, d2[:, None], first)))
    target = statistics_row(b, local, h, rows, H, LQ, TILE) + qi
    tl.store(EXTRA + target[:, None] * COLUMNS + c, tile.to(TYPE))


@triton.jit
def _keys_columns(keep, never, TYPE: tl.constexpr):
    """Left operands [keys, 16] against COLUMNS: (of the scores, of do v^T)."""
    c = tl.arange(0, COLUMNS)[None, :]
    kept = keep[:, None]
    of_scores = tl.where((c < PIECES) & kept, 1.0, tl.where((c == KEPT) & ~kept, never, 0.0))
    of_products = tl.where((c >= PIECES) & (c < 2 * PIECES) & kept, -1.0, 0.0)
    return of_scores.to(TYPE), of_products.to(TYPE)


@triton.jit
def _quads(tile, BX: tl.constexpr, BY: tl.constexpr):
    """A tile [BX, BY] in fp32 as two tensors [BX/16 * BY/16, 128]: upper and lower halves of its squares of 16 x 16.

    What a thread gets from the matrix unit of a half square are four values, which here lie side by side. The squares
    of a column come one after the other, as the warps of a program hold them.
    """
    x = tl.reshape(tile, (BX // 16, 2, 8, BY // 16, 2, 4, 2))
    x = tl.permute(x, (3, 0, 2, 5, 4, 6, 1))
    return tl.split(tl.reshape(x, (BX // 16 * (BY // 16), 128, 2)))


@triton.jit(
    repr=profiled_as("attention_joint"),
    do_not_specialize=[
        *COMMON, "batches", "start", "groups", "share", "splits", "mask_b", "mask_r", *strides_of("dk", "dv"),
    ],
)  # fmt: skip
def joint_kernel(
    Q, K, V, G, FLIPPED, MASK, EXTRA, PARTS, DK, DV, PLANES, R, H, LQ, LK, batches, start, groups, share, splits,
    q_b, q_r, q_h, q_l, k_b, k_r, k_h, k_l, v_b, v_r, v_h, v_l, g_b, g_r, g_h, g_l,
    dk_b, dk_r, dk_h, dk_l, dv_b, dv_r, dv_h, dv_l, mask_b, mask_r, scale, unit_scale, never,
    HAS_MASK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    WITH_PLANES: tl.constexpr,
    ROWS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of `share` key tiles of ROWS rows, their part of dq and, WITH_PLANES, of dbias; for the `groups` times
    ROWS rows from row `start` on. FLIPPED is the packed transposed bias; scores are built transposed, [k, q].

    The registers are full. So that none is kept for what only the next key tile needs, all addresses come from the
    number of the tile inside the loop, and the compiler is kept from making them before it. Sizes and strides are
    known not to be negative: else the upper half of each would take a register.
    """
    tl.assume(R > 0)
    tl.assume(H > 0)
    tl.assume(LQ > 0)
    tl.assume(LK > 0)
    tl.assume(batches > 0)
    tl.assume(start >= 0)
    tl.assume(groups > 0)
    tl.assume(share > 0)
    tl.assume(splits > 0)
    tl.assume((q_b >= 0) & (q_r >= 0) & (q_h >= 0) & (q_l >= 0))
    tl.assume((k_b >= 0) & (k_r >= 0) & (k_h >= 0) & (k_l >= 0))
    tl.assume((v_b >= 0) & (v_r >= 0) & (v_h >= 0) & (v_l >= 0))
    tl.assume((g_b >= 0) & (g_r >= 0) & (g_h >= 0) & (g_l >= 0))
    tl.assume((dk_b >= 0) & (dk_r >= 0) & (dk_h >= 0) & (dk_l >= 0))
    tl.assume((dv_b >= 0) & (dv_r >= 0) & (dv_h >= 0) & (dv_l >= 0))
    tl.assume((mask_b >= 0) & (mask_r >= 0))
    TYPE: tl.constexpr = Q.dtype.element_ty
    pid = tl.program_id(0)
    tl.assume(pid >= 0)
    tiles = tl.cdiv(LK, BK)
    first_tile = pid // splits * tiles + pid % splits * share
    end_tile = tl.minimum(first_tile + share, (pid // splits + 1) * tiles)
    d = tl.arange(0, BLOCK_D)
    q_offsets = tile_offsets(q_l, d, BQ)
    g_offsets = tile_offsets(g_l, d, BQ)
    c_offsets = (tl.arange(0, BQ) * COLUMNS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    squares = tl.arange(0, BQ // 16 * (BLOCK_D // 16))
    quads = (squares * 256)[:, None] + tl.arange(0, 128)[None, :]
    # Of 48 channels the last of four columns is padding.
    wide = (squares < BQ // 16 * ((D + 15) // 16))[:, None]
    for item in tl.range(first_tile, end_tile, disable_licm=True):
        tile = item % tiles
        line = item // tiles
        group = line % groups
        h = (line // groups % H).to(tl.int64)
        b = (line // groups // H).to(tl.int64)
        k0 = tile * BK
        ki = k0 + tl.arange(0, BK)
        q_blocks = tl.cdiv(LQ, TILE) * (TILE // 16)
        head_size = tl.cdiv(LK, TILE) * (TILE // 16) * q_blocks
        row_size = H * (q_blocks * 16)  # in queries, of PARTS and of EXTRA
        tl.assume((q_blocks > 0) & (head_size > 0) & (row_size > 0) & (item >= 0) & (tile >= 0) & (line >= 0))
        head = (line // groups).to(tl.int64)
        pointers = packed_pointers(FLIPPED + head * head_size * 256, tile, q_blocks, BK)
        if WITH_PLANES:
            plane = ((line // groups // H * groups + group) * H + line // groups % H).to(tl.int64)
            targets = value_pointers(PLANES + plane * head_size * 256, tile, q_blocks, BK)
        ks = ()
        vs = ()
        of_scores = ()
        of_products = ()
        dks = ()
        dvs = ()
        qbs = ()
        gbs = ()
        for i in tl.static_range(ROWS):
            # A row past the last is the last again, for the loads' sake: its columns leave it no probabilities.
            row = tl.minimum(start + group * ROWS + i, R - 1).to(tl.int64)
            keep = ki < LK
            if HAS_MASK:
                mask_at = (b * mask_b + row * mask_r) * 8
                keep = keep & (tl.load(MASK + mask_at + column_position(ki)) == 0.0)
            kept = keep[:, None] & (d < D)[None, :]
            k_at = ((ki * 8).to(tl.int64) * k_l)[:, None] + d[None, :]
            v_at = ((ki * 8).to(tl.int64) * v_l)[:, None] + d[None, :]
            ks = ks + (tl.load(head_of(K, b, row, h, k_b, k_r, k_h) + k_at, mask=kept, other=0.0),)
            vs = vs + (tl.load(head_of(V, b, row, h, v_b, v_r, v_h) + v_at, mask=kept, other=0.0),)
            scores_columns, products_columns = _keys_columns(keep, never, TYPE)
            of_scores = of_scores + (scores_columns,)
            of_products = of_products + (products_columns,)
            dks = dks + (tl.zeros((BK, BLOCK_D), tl.float32),)
            dvs = dvs + (tl.zeros((BK, BLOCK_D), tl.float32),)
            qbs = qbs + (head_of(Q, b, row, h, q_b, q_r, q_h),)
            gbs = gbs + (head_of(G, b, row, h, g_b, g_r, g_h),)

        group_at = (line // groups // H * groups + group) * (ROWS * H) + line // groups % H
        split_at = tile // share * batches * groups * (ROWS * H) + group_at
        columns_at = EXTRA + group_at.to(tl.int64) * (q_blocks * 16) * COLUMNS
        parts_at = PARTS + split_at.to(tl.int64) * (q_blocks * 16) * BLOCK_D
        raw = load_packed(pointers, 0, BQ)
        for q0 in tl.range(0, LQ, BQ, num_stages=STAGES):
            inside = (q0 + tl.arange(0, BQ) < LQ)[:, None] & (d < D)[None, :]
            ahead = tl.minimum(q0 // BQ + 1, q_blocks // (BQ // 16) - 1)
            new_dks = ()
            new_dvs = ()
            new_qbs = ()
            new_gbs = ()
            total = tl.zeros((BK, BQ), TYPE)
            for i in tl.static_range(ROWS):
                columns = tl.trans(tl.load(columns_at + i * (row_size * COLUMNS) + c_offsets))
                q = tl.load(qbs[i] + q_offsets, mask=inside, other=0.0)
                g = tl.load(gbs[i] + g_offsets, mask=inside, other=0.0)
                new_qbs = new_qbs + (token(qbs[i], BQ, q_l),)
                new_gbs = new_gbs + (token(gbs[i], BQ, g_l),)
                s = tl.dot(ks[i], tl.trans(q), tl.dot(of_scores[i], columns))
                dp = tl.dot(vs[i], tl.trans(g), tl.dot(of_products[i], columns))
                if i == 0:
                    # Not before the products: the load has until here. Nor the next one before this one is used.
                    bias = unpacked(raw, BK, BQ, FLIPPED.dtype.element_ty) * LOG2E
                p = powers(s * unit_scale + bias, False)
                if i == ROWS - 1:
                    raw = load_packed(pointers, ahead, BQ)
                new_dvs = new_dvs + (multiply_add(p.to(TYPE), g, dvs[i], "ieee"),)
                ds = (p * dp).to(TYPE)
                new_dks = new_dks + (multiply_add(ds, q, dks[i], "ieee"),)
                if WITH_PLANES:
                    total = ds if i == 0 else total + ds
                upper, lower = _quads(tl.dot(tl.trans(ds), ks[i]), BQ, BLOCK_D)
                part = parts_at + i * (row_size * BLOCK_D) + quads
                tl.store(part, upper, mask=wide & (item == first_tile))
                tl.store(part + 128, lower, mask=wide & (item == first_tile))
                tl.atomic_add(part, upper, mask=wide & (item != first_tile), sem="relaxed")
                tl.atomic_add(part + 128, lower, mask=wide & (item != first_tile), sem="relaxed")
            if WITH_PLANES:
                store_packed(targets, q0 // BQ, total, BK, BQ)
            dks = new_dks
            dvs = new_dvs
            qbs = new_qbs
            gbs = new_gbs
            columns_at += BQ * COLUMNS
            parts_at += BQ * BLOCK_D

        for i in tl.static_range(ROWS):
            row = (start + group * ROWS + i).to(tl.int64)
            stored = (ki < LK)[:, None] & (d < D)[None, :] & (row < R)
            dk_at = ((ki * 8).to(tl.int64) * dk_l)[:, None] + d[None, :]
            dv_at = ((ki * 8).to(tl.int64) * dv_l)[:, None] + d[None, :]
            dk = (dks[i] * scale).to(DK.dtype.element_ty)
            tl.store(head_of(DK, b, row, h, dk_b, dk_r, dk_h) + dk_at, dk, mask=stored)
            dv = dvs[i].to(DV.dtype.element_ty)  # type: ignore[var-annotated]
            tl.store(head_of(DV, b, row, h, dv_b, dv_r, dv_h) + dv_at, dv, mask=stored)


@triton.jit
def _sum_queries(
    pid, PARTS, DQ, H, LQ, batches, start, rows, room, splits, dq_b, dq_r, dq_h, dq_l, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Program `pid` of those that write dq of the `rows` rows from row `start` on: scale times the sum over splits, in
    order, of PARTS, which has `room` rows."""
    tiles = tl.cdiv(LQ, BQ)
    q0 = (pid % tiles).to(tl.int32) * BQ
    h = pid // tiles % H
    local = pid // tiles // H % rows
    b = pid // tiles // H // rows
    values = tl.arange(0, BQ * BLOCK_D)
    total = tl.zeros((BQ * BLOCK_D,), tl.float32)
    for split in range(splits):
        line = statistics_row(split * batches + b, local, h, room, H, LQ, TILE) + q0
        total += tl.load(PARTS + line * BLOCK_D + values, mask=values < BQ * ((D + 15) // 16 * 16), other=0.0)
    x = tl.reshape(total, (BLOCK_D // 16, BQ // 16, 2, 8, 4, 2, 2))
    dq = tl.reshape(tl.permute(x, (1, 2, 3, 0, 5, 4, 6)), (BQ, BLOCK_D)) * scale
    d = tl.arange(0, BLOCK_D)
    inside = (q0 + tl.arange(0, BQ) < LQ)[:, None] & (d < D)[None, :]
    base = token(head_of(DQ, b, start + local, h, dq_b, dq_r, dq_h), q0, dq_l)
    tl.store(base + tile_offsets(dq_l, d, BQ), dq.to(DQ.dtype.element_ty), mask=inside)


@triton.jit(
    repr=profiled_as("attention_joint_between"),
    do_not_specialize=[
        "R", "H", "LQ", "LK", "batches", "start", "rows", "groups", "splits", "next_rows", "sums", "folds",
        *strides_of("o", "g", "dq"),
    ],
)  # fmt: skip
def joint_between_kernel(
    O, G, LSE, DLSE, EXTRA, PARTS, DQ, PLANES, SUM, OUT, R, H, LQ, LK, batches, start, rows, groups, splits, next_rows,
    sums, folds, o_b, o_r, o_h, o_l, g_b, g_r, g_h, g_l, dq_b, dq_r, dq_h, dq_l, scale, unit_scale, never,
    HAS_DLSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    BQ: tl.constexpr, BY: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """What is to be done between two chunks of rows, in one launch: dq of the chunk of `rows` rows from row `start` on, by
    `sums` programs; its planes of dbias, `groups` of them, by `folds` programs; and, by the rest, EXTRA of the
    `next_rows` rows of the next chunk, which begins where this one has room for no more."""
    pid = tl.program_id(0).to(tl.int64)
    room = groups * ROWS
    if pid < sums:
        _sum_queries(
            pid, PARTS, DQ, H, LQ, batches, start, rows, room, splits, dq_b, dq_r, dq_h, dq_l, scale,
            D, BLOCK_D, TILE, BQ,
        )  # fmt: skip
    elif pid < sums + folds:
        fold_planes(pid - sums, PLANES, SUM, OUT, H, LK, LQ, groups, start > 0, TILE, True, BY, TOGETHER)
    else:
        _write_columns(
            pid - sums - folds, O, G, LSE, DLSE, EXTRA, R, H, LQ, start + room, next_rows,
            o_b, o_r, o_h, o_l, g_b, g_r, g_h, g_l, unit_scale, never, HAS_DLSE, D, BLOCK_D, TILE,
        )  # fmt: skip
