"""LayerNorm and up to four linear maps of one width, plus a narrow one: one read of the input.

With x̂ = (x - mean) · rstd and n = LN(x) = γ ⊙ x̂ + β:  y_t = n·w_tᵀ `[rows, h]` for t < T ≤ 4, and s = head·nᵀ
`[heads, rows]`. Backward, with the head among the maps, d for a gradient's column and w for its weights:

- dx = rstd · (g - x̂ · Σ_c g x̂ / c), where g = Σ d·w' and w' = γ ⊙ w less its mean over c, rounded to the compute dtype:
  the mean of g that layer norm takes off is taken off the weights.
- dw = γ ⊙ m + β · Σ d, dγ = Σ w ⊙ m and dβ = Σ w · Σ d, where m = Σ d · x̂ and the sums without index are over rows,
  those of dγ and dβ over all rows of all weights: the norm's gradients are read off those of the weights.

FLOP: 2·rows·c·(T·h + heads) forward, twice that backward. Bytes: forward reads x and writes the results;
`input_gradient` reads x and the gradients, writes dx and x̂ and reads x̂ again (from L2); `weight_gradient` reads one
gradient and x̂ for every BN outputs.
"""

# ruff: noqa: ANN001, ANN201, RUF005 (Triton compiles these functions: an annotation would mean a constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate, normalise_rows

COLUMNS = tl.constexpr(16)
"""The fewest that a matrix product has on every GPU."""


@triton.jit(repr=profiled_as("layer_norm_linear_forward"))
def forward_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    s_ptr,
    rows,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    SHORT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All results of BM rows; the weights `[T·H, C]` and the narrow one `[HEADS, C]` are packed.

    Tiles as of `input_gradient_kernel`: the last ends with the last row, SHORT says that there are fewer rows than one has.
    """
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(rows > 0)
    tl.assume(tl.program_id(0) >= 0)
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    FULL: tl.constexpr = C == BC and H % BN == 0 and not SHORT
    CHUNKS: tl.constexpr = (H + BN - 1) // BN if T > 0 else 1
    c = tl.arange(0, BC)
    r = tl.arange(0, BM)
    real = (r < rows) | (not SHORT)
    first = tl.program_id(0).to(tl.int64) * BM
    if not SHORT:
        first = tl.minimum(first, rows - BM)
    cells = r[:, None] * C + c[None, :]
    x = tl.load(x_ptr + first * C + cells, mask=real[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normal, _ = normalise_rows(x, c, eps, C, EXACT)
    n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
    # One loop takes the chunks of all T maps, so that its copies never run dry between two of them.
    for chunk in tl.range(0, T * CHUNKS, num_stages=STAGES):
        t = chunk // CHUNKS
        start = (chunk % CHUNKS) * BN
        j = tl.arange(0, BN)
        y_ptr = tl.where(t == 0, y0_ptr, tl.where(t == 1, y1_ptr, tl.where(t == 2, y2_ptr, y3_ptr)))
        w_cells = w_ptr + (t * H + start) * C + (j[:, None] * C + c[None, :])
        where = y_ptr + (first * H + start) + (r[:, None] * H + j[None, :])
        if FULL:
            w = tl.load(w_cells)
            y = tl.dot(n, tl.trans(w), input_precision="ieee")
            tl.store(where, y.to(y_ptr.dtype.element_ty))
        else:
            own = start + j < H
            w = tl.load(w_cells, mask=own[:, None] & (c < C)[None, :], other=0.0)
            y = tl.dot(n, tl.trans(w), input_precision="ieee")
            tl.store(where, y.to(y_ptr.dtype.element_ty), mask=real[:, None] & own[None, :])
    if HEADS > 0:
        k = tl.arange(0, BS)
        head_cells = w_ptr + (T * H + k)[:, None] * C + c[None, :]
        head = tl.load(head_cells, mask=(k < HEADS)[:, None] & (c < C)[None, :], other=0.0)
        s = tl.dot(n, tl.trans(head), input_precision="ieee").to(s_ptr.dtype.element_ty)
        where = s_ptr + first + k.to(tl.int64)[None, :] * rows + r[:, None]
        tl.store(where, s, mask=real[:, None] & (k < HEADS)[None, :])


@triton.jit(repr=profiled_as("layer_norm_linear_narrow"))
def narrow_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    s_ptr,
    rows,
    eps,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """s `[HEADS, rows]` of BM rows in fp32, where the narrow map is the only one: by sums, not by a product.

    A product in fp32 reads both tiles from shared memory, where all rows lie in one bank. Here a row is in the registers
    of four lanes, which read it BN = 16 columns at a time, and its sums need no more than two exchanges between lanes.
    """
    BLOCKS: tl.constexpr = (C + BN - 1) // BN
    FULL: tl.constexpr = C % BN == 0
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    own = r < rows
    x = ()
    total = tl.zeros([BM, BN], tl.float32)
    for j in tl.static_range(BLOCKS):
        c = j * BN + tl.arange(0, BN)
        inside = own[:, None] if FULL else own[:, None] & (c < C)[None, :]
        block = tl.load(x_ptr + r[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += block
        x = x + (block,)
    mean = tl.sum(total, 1) / C
    squares = tl.zeros([BM, BN], tl.float32)
    centred = ()
    for j in tl.static_range(BLOCKS):
        block = x[j] - mean[:, None]
        if not FULL:
            block = tl.where((j * BN + tl.arange(0, BN) < C)[None, :], block, 0.0)
        squares += block * block
        centred = centred + (block,)
    rstd = tl.div_rn(tl.full([BM], 1.0, tl.float32), tl.sqrt_rn(tl.sum(squares, 1) / C + eps))
    n = ()
    for j in tl.static_range(BLOCKS):
        c = j * BN + tl.arange(0, BN)
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        n = n + (centred[j] * rstd[:, None] * gamma[None, :] + beta[None, :],)
    where = s_ptr + r
    for head in tl.range(0, HEADS):
        products = tl.zeros([BM, BN], tl.float32)
        for j in tl.static_range(BLOCKS):
            c = j * BN + tl.arange(0, BN)
            w = tl.load(w_ptr + head * C + c, mask=c < C, other=0.0)
            products += n[j] * w[None, :]
        tl.store(where, tl.sum(products, 1), mask=own)
        where += rows


@triton.jit(repr=profiled_as("layer_norm_linear_fold_weights"))
def fold_weights_kernel(
    w_ptr, gamma_ptr, folded_ptr, rows, C: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr
):
    """w' = γ ⊙ w less its mean over c, of ROWS rows of the packed weights."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BC)
    real = (t < rows)[:, None] & (c < C)[None, :]
    cells = t[:, None] * C + c[None, :]
    w = tl.load(w_ptr + cells, mask=real, other=0.0).to(tl.float32)
    w = w * tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    w -= (tl.sum(w, 1) / C)[:, None]
    tl.store(folded_ptr + cells, w.to(folded_ptr.dtype.element_ty), mask=real)


@triton.jit(repr=profiled_as("layer_norm_linear_input_gradient"))
def input_gradient_kernel(
    x_ptr,
    folded_ptr,
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    ds_ptr,
    dx_ptr,
    normal_ptr,
    more_ptr,
    rows,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    SHORT: tl.constexpr,
    MORE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx and x̂ of BM rows. MORE: another gradient of x is added to dx.

    The last tile ends with the last row, so that none is masked: what it shares with the one before is computed twice,
    to the same bits. SHORT: fewer rows than a tile has, which are.
    """
    # Known signs spare the registers and instructions that extend 32-bit numbers to 64 bits.
    tl.assume(rows > 0)
    tl.assume(tl.program_id(0) >= 0)
    dtype = folded_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    FULL: tl.constexpr = C == BC and H % BN == 0 and not SHORT
    CHUNKS: tl.constexpr = (H + BN - 1) // BN if T > 0 else 1
    c = tl.arange(0, BC)
    r = tl.arange(0, BM)
    k = tl.arange(0, BS)
    real = (r < rows) | (not SHORT)
    inside = real[:, None] & (c < C)[None, :]
    cells = r[:, None] * C + c[None, :]
    first = tl.program_id(0).to(tl.int64) * BM
    if not SHORT:
        first = tl.minimum(first, rows - BM)
    x = tl.load(x_ptr + first * C + cells, mask=inside, other=0.0)
    normal, rstd = normalise_rows(x.to(tl.float32), c, eps, C, EXACT)
    tl.store(normal_ptr + first * C + cells, normal.to(dtype), mask=inside)
    acc = tl.zeros([BM, BC], tl.float32)
    if HEADS > 0:
        head_cells = folded_ptr + (T * H + k)[:, None] * C + c[None, :]
        head = tl.load(head_cells, mask=(k < HEADS)[:, None] & (c < C)[None, :], other=0.0)
        ds_cells = ds_ptr + first + k.to(tl.int64)[None, :] * rows + r[:, None]
        ds = tl.load(ds_cells, mask=real[:, None] & (k < HEADS)[None, :], other=0.0)
        acc = accumulate(acc, ds.to(dtype), head)
    # One loop takes the chunks of all T maps, so that its copies never run dry between two of them.
    for chunk in tl.range(0, T * CHUNKS, num_stages=STAGES):
        t = chunk // CHUNKS
        start = (chunk % CHUNKS) * BN
        j = tl.arange(0, BN)
        dy_ptr = tl.where(t == 0, dy0_ptr, tl.where(t == 1, dy1_ptr, tl.where(t == 2, dy2_ptr, dy3_ptr)))
        w_cells = folded_ptr + (t * H + start) * C + (j[:, None] * C + c[None, :])
        where = dy_ptr + (first * H + start) + (r[:, None] * H + j[None, :])
        if FULL:
            w = tl.load(w_cells)
            dy = tl.load(where).to(dtype)
        else:
            own = start + j < H
            w = tl.load(w_cells, mask=own[:, None] & (c < C)[None, :], other=0.0)
            dy = tl.load(where, mask=real[:, None] & own[None, :], other=0.0).to(dtype)
        acc = accumulate(acc, dy, w)
    # x̂ is read again: kept through the loop it would cost BM·BC registers.
    tl.debug_barrier()
    normal = tl.load(normal_ptr + first * C + cells, mask=inside, other=0.0).to(tl.float32)
    second = tl.sum(acc * normal, 1) / C
    dx = (acc - normal * second[:, None]) * rstd[:, None]
    if MORE:
        tl.debug_barrier()  # or the load is moved up, to where there are no registers for it
        dx += tl.load(more_ptr + first * C + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + first * C + cells, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("layer_norm_linear_weight_gradient"), do_not_specialize=["splits"])
def weight_gradient_kernel(
    normal_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    dw_partial_ptr,
    norm_partial_ptr,
    rows,
    splits,
    stride_row,
    stride_column,
    C: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial dw `[T, H, C]`, BN outputs of one of the T maps over every `splits`-th tile of rows; shares of dγ and dβ."""
    tl.assume(rows > 0)
    tl.assume(splits > 0)
    tl.assume(stride_row > 0)
    tl.assume(stride_column > 0)
    tl.assume(tl.program_id(0) >= 0)
    tl.assume(tl.program_id(1) >= 0)
    chunks: tl.constexpr = (H + BN - 1) // BN
    t = tl.program_id(0) // chunks
    split = tl.program_id(1)
    dy_ptr = dy0_ptr
    if t == 1:
        dy_ptr = dy1_ptr
    elif t == 2:
        dy_ptr = dy2_ptr
    elif t == 3:
        dy_ptr = dy3_ptr
    j = (tl.program_id(0) % chunks) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    acc = tl.zeros([BN, BC], tl.float32)
    dtype = normal_ptr.dtype.element_ty
    # Tall tiles of dy are summed by the matrix unit, which reads them from shared memory: nothing else brings them into
    # registers. Of others the positions are added up, and the rows of a tile at the end.
    MULTIPLY: tl.constexpr = BN >= 64 and dtype != tl.float32
    ones = tl.full([BM, COLUMNS], 1.0, tl.float32).to(dtype)
    total = tl.zeros([BN, COLUMNS] if MULTIPLY else [BN, BM], tl.float32)
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        real = (m < rows)[:, None] & (c < C)[None, :]
        normal = tl.load(normal_ptr + m[:, None] * C + c[None, :], mask=real, other=0.0)
        where = dy_ptr + m[:, None] * stride_row + j.to(tl.int64)[None, :] * stride_column
        dy = tl.load(where, mask=(m < rows)[:, None] & (j < H)[None, :], other=0.0).to(normal.dtype)
        acc = accumulate(acc, tl.trans(dy), normal)
        if MULTIPLY:
            total = accumulate(total, tl.trans(dy), ones)
        else:
            total += tl.trans(dy).to(tl.float32)
    own = (j < H)[:, None] & (c < C)[None, :]
    cells = t * (H * C) + j[:, None] * C + c[None, :]
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.sum(total, 1)[:, None]
    if MULTIPLY:
        sums /= COLUMNS  # which are all the same
    partial_ptr = dw_partial_ptr + split.to(tl.int64) * (T * H * C)
    tl.store(partial_ptr + cells, acc * gamma[None, :] + sums * beta[None, :], mask=own)
    w = tl.load(w_ptr + cells, mask=own, other=0.0).to(tl.float32)
    share_ptr = norm_partial_ptr + (split * (T * chunks) + tl.program_id(0)).to(tl.int64) * (2 * C)
    tl.store(share_ptr + c, tl.sum(w * acc, 0), mask=c < C)
    tl.store(share_ptr + C + c, tl.sum(w * sums, 0), mask=c < C)
