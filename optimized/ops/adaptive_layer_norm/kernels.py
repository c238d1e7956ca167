"""Adaptive LayerNorm: the two norms, the gate and the shift around one matrix product.

With n = γ ⊙ LN(s) and (g, t) = n·(w_scale, w_shift)ᵀ, which a library product computes once per row of s:
y = σ(g + b) ⊙ LN(a) + t. Row r of a belongs to row r mod period of s, so samples that share s share g and t.
Backward: dt = Σ dy, dg = σ(1-σ) ⊙ Σ dy ⊙ LN(a) over the samples of a row of s, summed in registers in their
order; da by the backward of LayerNorm; ds, dγ from dn = (dg, dt)·(w_scale, w_shift).

Elements moved, c channels of a, R rows of a, P rows of s: forward 2·R·c + 2·P·c (a, y, g, t), backward
3·R·c + 4·P·c (and y once more where the caller wants it recomputed).
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import normal_backward, normalise_rows, normalise_rows_backward, sigmoid


@triton.jit(repr=profiled_as("adaptive_layer_norm_norm"), do_not_specialize=["rows"])
def norm_kernel(s_ptr, gamma_ptr, n_ptr, rows, eps, C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr):
    """n = γ ⊙ LN(s) of BM rows."""
    EXACT: tl.constexpr = n_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    tile = m[:, None] * C + c[None, :]
    normal, _ = normalise_rows(tl.load(s_ptr + tile, mask=inside, other=0.0).to(tl.float32), c, eps, C, EXACT)
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(n_ptr + tile, (normal * gamma[None, :]).to(n_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("adaptive_layer_norm_norm_backward"), do_not_specialize=["rows"])
def norm_backward_kernel(
    s_ptr,
    gamma_ptr,
    dn_ptr,
    extra_ptr,
    ds_ptr,
    n_ptr,
    partial_ptr,
    rows,
    eps,
    EXTRA: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    """ds of BM rows, plus `extra` where there is one, n for the weight gradients, and this tile's share of dγ."""
    EXACT: tl.constexpr = dn_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    tile = m[:, None] * C + c[None, :]
    normal, rstd = normalise_rows(
        tl.load(s_ptr + tile, mask=inside, other=0.0).to(tl.float32), c, eps, C, EXACT
    )
    gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(n_ptr + tile, (normal * gamma[None, :]).to(n_ptr.dtype.element_ty), mask=inside)
    dn = tl.load(dn_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    ds = normalise_rows_backward(dn, normal, gamma, rstd, C)
    if EXTRA:
        ds += tl.load(extra_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(ds_ptr + tile, ds.to(ds_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(dn * normal, 0), mask=c < C)


@triton.jit(repr=profiled_as("adaptive_layer_norm_modulate"), do_not_specialize=["rows", "period"])
def modulate_kernel(
    a_ptr,
    p_ptr,
    bias_ptr,
    y_ptr,
    rows,
    period,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    """y of BM rows of a; p `[period, 2C]` holds g and t."""
    EXACT: tl.constexpr = p_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None] & (c < C)[None, :]
    tile = m[:, None] * C + c[None, :]
    normal, _ = normalise_rows(tl.load(a_ptr + tile, mask=inside, other=0.0).to(tl.float32), c, eps, C, EXACT)
    shared = p_ptr + (m % period)[:, None] * 2 * C + c[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    gate = sigmoid(tl.load(shared, mask=inside, other=0.0).to(tl.float32) + bias[None, :], False, EXACT)
    shift = tl.load(shared + C, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + tile, (gate * normal + shift).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    repr=profiled_as("adaptive_layer_norm_modulate_backward"), do_not_specialize=["period", "samples"]
)
def modulate_backward_kernel(
    a_ptr,
    p_ptr,
    bias_ptr,
    dy_ptr,
    da_ptr,
    y_ptr,
    dp_ptr,
    partial_ptr,
    period,
    samples,
    eps,
    RECOMPUTE: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
):
    """da of all samples of BM rows of s, dp `[period, 2C]`, this tile's share of db; y again with RECOMPUTE."""
    EXACT: tl.constexpr = p_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < period)[:, None] & (c < C)[None, :]
    shared = m[:, None] * 2 * C + c[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    gate = sigmoid(
        tl.load(p_ptr + shared, mask=inside, other=0.0).to(tl.float32) + bias[None, :], False, EXACT
    )
    dgate = tl.zeros([BM, BC], tl.float32)
    dshift = tl.zeros([BM, BC], tl.float32)
    for sample in range(samples):
        tile = (m + tl.cast(sample, tl.int64) * period)[:, None] * C + c[None, :]
        a = tl.load(a_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        normal, rstd = normalise_rows(a, c, eps, C, EXACT)
        if RECOMPUTE:
            shift = tl.load(p_ptr + shared + C, mask=inside, other=0.0).to(tl.float32)
            tl.store(y_ptr + tile, (gate * normal + shift).to(y_ptr.dtype.element_ty), mask=inside)
        da = normal_backward(dy * gate, normal, rstd, C)
        tl.store(da_ptr + tile, da.to(da_ptr.dtype.element_ty), mask=inside)
        dgate += dy * normal
        dshift += dy
    dgate *= gate * (1.0 - gate)
    tl.store(dp_ptr + shared, dgate.to(dp_ptr.dtype.element_ty), mask=inside)
    tl.store(dp_ptr + shared + C, dshift.to(dp_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(dgate, 0), mask=c < C)
