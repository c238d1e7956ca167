"""LayerNorm and up to four linear maps of one width, plus a narrow one: one read of the input.

With n = LN(x):  y_t = n·w_tᵀ `[rows, h]` for t < T ≤ 4, and s = head·nᵀ `[heads, rows]`.
Backward: dn = Σ_t dy_t·w_t + dsᵀ·head, then the layer-norm backward; dw_t = dy_tᵀ·n, d_head = ds·n.

FLOP: 2·rows·c·(T·h + heads) forward, twice that backward. Bytes: forward reads x and writes the results;
`input_gradient` reads x and the gradients and writes dx and n; `weight_gradient` reads one gradient and n.
"""

# ruff: noqa: ANN001, ANN201, SIM116 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate, as_memory_lies, finish_rows, normalise_rows


@triton.jit
def pick(t: tl.constexpr, first, second, third, fourth):
    """The t-th of four pointers."""
    if t == 0:
        return first
    elif t == 1:
        return second
    elif t == 2:
        return third
    else:
        return fourth


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
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All results of BM rows; the weights `[T·H, C]` and the narrow one `[HEADS, C]` are packed."""
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + m[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    normal, _ = normalise_rows(x, c, eps, C, EXACT)
    n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
    for t in tl.static_range(T):
        y_ptr = pick(t, y0_ptr, y1_ptr, y2_ptr, y3_ptr)
        for start in tl.range(0, H, BN, num_stages=STAGES):
            j = start + tl.arange(0, BN)
            w = tl.load(
                w_ptr + (t * H + j)[:, None] * C + c[None, :],
                mask=(j < H)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            y = tl.dot(n, tl.trans(w), input_precision="ieee").to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + m[:, None] * H + j[None, :], y, mask=(m < rows)[:, None] & (j < H)[None, :])
    if HEADS > 0:
        k = tl.arange(0, BS)
        head = tl.load(
            w_ptr + (T * H + k)[:, None] * C + c[None, :],
            mask=(k < HEADS)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        s = tl.dot(n, tl.trans(head), input_precision="ieee").to(s_ptr.dtype.element_ty)
        where = s_ptr + k.to(tl.int64)[None, :] * rows + m[:, None]
        tl.store(where, s, mask=(m < rows)[:, None] & (k < HEADS)[None, :])


@triton.jit(repr=profiled_as("layer_norm_linear_input_gradient"), do_not_specialize=["group"])
def input_gradient_kernel(
    x_ptr,
    gamma_ptr,
    beta_ptr,
    w_ptr,
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    ds_ptr,
    dx_ptr,
    n_ptr,
    norm_partial_ptr,
    rows,
    group,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    T: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`group` tiles of BM rows: dx, n for the weight gradients, and the program's share of dγ and dβ.

    One loop takes the chunks of all T maps, so that its copies never run dry between two of them.
    """
    dtype = w_ptr.dtype.element_ty
    EXACT: tl.constexpr = dtype == tl.float32
    FULL: tl.constexpr = C == BC and H % BN == 0
    CHUNKS: tl.constexpr = (H + BN - 1) // BN if T > 0 else 1
    c = tl.arange(0, BC)
    for step in range(group):
        m = (tl.program_id(0).to(tl.int64) * group + step) * BM + tl.arange(0, BM)
        inside = (m < rows)[:, None] & (c < C)[None, :]
        tile = m[:, None] * C + c[None, :]
        x = tl.load(x_ptr + tile, mask=inside, other=0.0)
        if HEADS > 0:
            k = tl.arange(0, BS)
            real_head = (k < HEADS)[:, None] & (c < C)[None, :]
            real_ds = (m < rows)[:, None] & (k < HEADS)[None, :]
            head = tl.load(w_ptr + (T * H + k)[:, None] * C + c[None, :], mask=real_head)
            ds = tl.load(ds_ptr + k.to(tl.int64)[None, :] * rows + m[:, None], mask=real_ds)
        acc = tl.zeros([BM, BC], tl.float32)
        for chunk in tl.range(0, T * CHUNKS, num_stages=STAGES):
            t = chunk // CHUNKS
            j = (chunk % CHUNKS) * BN + tl.arange(0, BN)
            dy_ptr = tl.where(t == 0, dy0_ptr, tl.where(t == 1, dy1_ptr, tl.where(t == 2, dy2_ptr, dy3_ptr)))
            cells = w_ptr + (t * H + j)[:, None] * C + c[None, :]
            where = dy_ptr + m[:, None] * H + j[None, :]
            if FULL:
                w = tl.load(cells)
                dy = tl.load(where, mask=(m < rows)[:, None], other=0.0).to(dtype)
            else:
                w = tl.load(cells, mask=(j < H)[:, None] & (c < C)[None, :], other=0.0)
                dy = tl.load(where, mask=(m < rows)[:, None] & (j < H)[None, :], other=0.0).to(dtype)
            acc = accumulate(acc, dy, w)
        if HEADS > 0:
            # What is masked is set to zero only here: the compiler would wait for both before the loop to store them.
            ds = tl.where(real_ds, ds, 0.0).to(dtype)
            acc = accumulate(acc, ds, tl.where(real_head, head, 0.0).to(dtype))
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        dn = as_memory_lies(acc, dx_ptr + tile, inside)
        normal, rstd = normalise_rows(x.to(tl.float32), c, eps, C, EXACT)
        n = normal * gamma[None, :] + beta[None, :]
        tl.store(n_ptr + tile, n.to(dtype), mask=inside)
        share_ptr = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * C
        finish_rows(dn, normal, rstd, gamma, dx_ptr, share_ptr, tile, inside, c, step > 0, C)


@triton.jit(repr=profiled_as("layer_norm_linear_weight_gradient"), do_not_specialize=["splits"])
def weight_gradient_kernel(
    n_ptr,
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    partial_ptr,
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
    """Partial dw `[T, H, C]`: BN outputs of one of the T maps over every `splits`-th tile of rows."""
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
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        n = tl.load(
            n_ptr + m[:, None] * C + c[None, :], mask=(m < rows)[:, None] & (c < C)[None, :], other=0.0
        )
        where = dy_ptr + m[:, None] * stride_row + j.to(tl.int64)[None, :] * stride_column
        dy = tl.load(where, mask=(m < rows)[:, None] & (j < H)[None, :], other=0.0).to(n.dtype)
        acc = accumulate(acc, tl.trans(dy), n)
    share = partial_ptr + (split.to(tl.int64) * T + t) * H * C
    tl.store(share + j[:, None] * C + c[None, :], acc, mask=(j < H)[:, None] & (c < C)[None, :])
