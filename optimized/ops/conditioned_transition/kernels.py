"""The elementwise parts of the conditioned transition between its matrix products.

h = swish(u) ⊙ v for (u, v) side by side; y = σ(g + b) ⊙ o with g shared by the rows r of o with the same
r mod period. Backward: h again, du, dv from dh; do = σ ⊙ dy and dg = (1-σ) ⊙ Σ dy ⊙ y over the samples of a
row of g (y = σ ⊙ o, so o is not needed), summed in registers in their order.

At 768 channels a row tile with its 1536 hidden channels and the weights (7 MB in bf16) does not fit a
multiprocessor, and the products are large enough for the library: what is saved is the traffic between them.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as
from optimized.ops.rows import sigmoid


@triton.jit(repr=profiled_as("conditioned_transition_swiglu"), do_not_specialize=["rows"])
def swiglu_kernel(u_ptr, h_ptr, rows, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """h `[rows, H]` from u and v side by side `[rows, 2H]`."""
    EXACT: tl.constexpr = u_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (j < H)[None, :]
    pair = u_ptr + m[:, None] * 2 * H + j[None, :]
    u = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(pair + H, mask=inside, other=0.0).to(tl.float32)
    h = u * sigmoid(u, False, EXACT) * v
    tl.store(h_ptr + m[:, None] * H + j[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("conditioned_transition_swiglu_backward"), do_not_specialize=["rows"])
def swiglu_backward_kernel(
    u_ptr, dh_ptr, du_ptr, h_ptr, rows, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """du and dv side by side, and h again for the gradient of w_out."""
    EXACT: tl.constexpr = u_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (j < H)[None, :]
    pair = m[:, None] * 2 * H + j[None, :]
    tile = m[:, None] * H + j[None, :]
    u = tl.load(u_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(u_ptr + pair + H, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(u, False, EXACT)
    swish = u * s
    du = dh * v * (s + swish * (1.0 - s))
    tl.store(du_ptr + pair, du.to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + pair + H, (dh * swish).to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(h_ptr + tile, (swish * v).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("conditioned_transition_gate"), do_not_specialize=["rows", "period"])
def gate_kernel(
    o_ptr, g_ptr, bias_ptr, y_ptr, rows, period, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """y of BM rows by BN channels; g `[period, C]`."""
    EXACT: tl.constexpr = g_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (j < C)[None, :]
    tile = m[:, None] * C + j[None, :]
    bias = tl.load(bias_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + (m % period)[:, None] * C + j[None, :], mask=inside, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + tile, mask=inside, other=0.0).to(tl.float32)
    y = sigmoid(g + bias[None, :], False, EXACT) * o
    tl.store(y_ptr + tile, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(repr=profiled_as("conditioned_transition_gate_backward"), do_not_specialize=["period", "samples"])
def gate_backward_kernel(
    y_ptr,
    g_ptr,
    bias_ptr,
    dy_ptr,
    do_ptr,
    dg_ptr,
    partial_ptr,
    period,
    samples,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """do of all samples of BM rows of g, dg `[period, C]`, and this tile's share of the gradient of the bias."""
    EXACT: tl.constexpr = g_ptr.dtype.element_ty == tl.float32
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < period)[:, None] & (j < C)[None, :]
    shared = m[:, None] * C + j[None, :]
    bias = tl.load(bias_ptr + j, mask=j < C, other=0.0).to(tl.float32)
    gate = sigmoid(
        tl.load(g_ptr + shared, mask=inside, other=0.0).to(tl.float32) + bias[None, :], False, EXACT
    )
    dg = tl.zeros([BM, BN], tl.float32)
    for sample in range(samples):
        tile = shared + tl.cast(sample, tl.int64) * period * C
        y = tl.load(y_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + tile, mask=inside, other=0.0).to(tl.float32)
        tl.store(do_ptr + tile, (dy * gate).to(do_ptr.dtype.element_ty), mask=inside)
        dg += dy * y
    dg *= 1.0 - gate
    tl.store(dg_ptr + shared, dg.to(dg_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * C + j, tl.sum(dg, 0), mask=j < C)
