"""Output side of triangle multiplication: LN(x)·outᵀ ⊙ σ(LN(z)·gᵀ), forward and backward.

x is the contraction, `[h, P, P]` channel by channel with its padding zero. LN(x), LN(z) and the gate are
recomputed wherever they are needed; nothing else is saved.

One GEMM unit is 2·N²·c·h FLOP: forward 2 units, `input_gradient` 4, `weight_gradient` 4 (2 recomputed).
Bytes: forward reads x and z and writes y; input_gradient reads x, z, dy and writes dx and the gate's dn;
weight_gradient reads x, z and dy.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles these functions: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import triton
import triton.language as tl

from optimized.ops.rows import normalise_rows, normalise_rows_backward, sigmoid
from optimized.ops.triangle_multiplication.project import load_rows, pair_rows


@triton.jit
def load_columns(x_ptr, gamma_ptr, beta_ptr, p, h, area, eps, H: tl.constexpr):
    """Layer-normed tile `[BM, BH]` of the channel-major x (fp32), its normalised values, rstd and γ."""
    where = x_ptr + h.to(tl.int64)[None, :] * area + p[:, None]
    x = tl.load(where, mask=(p < area)[:, None] & (h < H)[None, :], other=0.0)
    gamma = tl.load(gamma_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    normal, rstd = normalise_rows(x.to(tl.float32), h, eps, H)
    return normal * gamma[None, :] + beta[None, :], normal, rstd, gamma


@triton.jit
def forward_kernel(
    x_ptr,
    z_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    wo_ptr,
    wg_ptr,
    out_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y `[N·N, c]` of BM positions, BN output channels at a time."""
    dtype = wo_ptr.dtype.element_ty
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
    nx, _, _, _ = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H)
    nz, _, _, _ = load_rows(z_ptr, gamma_z_ptr, beta_z_ptr, source, inside, c, eps, C)
    nx = nx.to(dtype)
    nz = nz.to(dtype)
    for start in tl.range(0, C, BN, num_stages=STAGES):
        t = start + tl.arange(0, BN)
        wo = tl.load(
            wo_ptr + t[:, None] * H + h[None, :], mask=(t < C)[:, None] & (h < H)[None, :], other=0.0
        )
        wg = tl.load(
            wg_ptr + t[:, None] * C + c[None, :], mask=(t < C)[:, None] & (c < C)[None, :], other=0.0
        )
        linear = tl.dot(nx, tl.trans(wo), input_precision="ieee")
        gate = sigmoid(tl.dot(nz, tl.trans(wg), input_precision="ieee"))
        y = (linear * gate).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + dense[:, None] * C + t[None, :], y, mask=inside[:, None] & (t < C)[None, :])


@triton.jit
def input_gradient_kernel(
    x_ptr,
    z_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    wo_ptr,
    wg_ptr,
    dy_ptr,
    dx_ptr,
    dn_ptr,
    norm_partial_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx `[h, P, P]` (padding zero), the gate's gradient to LN(z) `[N·N, c]`, shares of the output norm's dγ, dβ."""
    dtype = wo_ptr.dtype.element_ty
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
    nx, _, _, _ = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H)
    nz, _, _, _ = load_rows(z_ptr, gamma_z_ptr, beta_z_ptr, source, inside, c, eps, C)
    nx = nx.to(dtype)
    nz = nz.to(dtype)
    dnx = tl.zeros([BM, BH], tl.float32)
    dnz = tl.zeros([BM, BC], tl.float32)
    for start in tl.range(0, C, BN, num_stages=STAGES):
        t = start + tl.arange(0, BN)
        wo = tl.load(
            wo_ptr + t[:, None] * H + h[None, :], mask=(t < C)[:, None] & (h < H)[None, :], other=0.0
        )
        wg = tl.load(
            wg_ptr + t[:, None] * C + c[None, :], mask=(t < C)[:, None] & (c < C)[None, :], other=0.0
        )
        dy = tl.load(
            dy_ptr + dense[:, None] * C + t[None, :], mask=inside[:, None] & (t < C)[None, :], other=0.0
        ).to(tl.float32)
        linear = tl.dot(nx, tl.trans(wo), input_precision="ieee")
        gate = sigmoid(tl.dot(nz, tl.trans(wg), input_precision="ieee"))
        d_linear = dy * gate
        d_gate = d_linear * linear * (1.0 - gate)
        dnx = tl.dot(d_linear.to(dtype), wo, dnx, input_precision="ieee")
        dnz = tl.dot(d_gate.to(dtype), wg, dnz, input_precision="ieee")
    tile = dense[:, None] * C + c[None, :]
    tl.store(dn_ptr + tile, dnz.to(dn_ptr.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])
    _, normal, rstd, gamma = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H)
    dx = normalise_rows_backward(dnx, normal, gamma, rstd, H)
    where = dx_ptr + h.to(tl.int64)[None, :] * area + p[:, None]
    tl.store(where, dx.to(dx_ptr.dtype.element_ty), mask=(p < area)[:, None] & (h < H)[None, :])
    share = norm_partial_ptr + tl.program_id(0).to(tl.int64) * 2 * H + h
    tl.store(share, tl.sum(dnx * normal, 0), mask=h < H)
    tl.store(share + H, tl.sum(dnx, 0), mask=h < H)


@triton.jit(do_not_specialize=["splits"])
def weight_gradient_kernel(
    x_ptr,
    z_ptr,
    gamma_x_ptr,
    beta_x_ptr,
    gamma_z_ptr,
    beta_z_ptr,
    wo_ptr,
    wg_ptr,
    dy_ptr,
    partial_ptr,
    n_tokens,
    padded,
    stride_i,
    stride_j,
    eps,
    splits,
    C: tl.constexpr,
    H: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial d_out `[c, h]` and d_g `[c, c]` of BN output channels over every `splits`-th tile of positions."""
    dtype = wo_ptr.dtype.element_ty
    split = tl.program_id(1)
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    h = tl.arange(0, BH)
    area = padded.to(tl.int64) * padded
    real_o = (h < H)[:, None] & (t < C)[None, :]
    real_g = (c < C)[:, None] & (t < C)[None, :]
    wo = tl.load(wo_ptr + t[None, :] * H + h[:, None], mask=real_o, other=0.0)
    wg = tl.load(wg_ptr + t[None, :] * C + c[:, None], mask=real_g, other=0.0)
    dwo = tl.zeros([BH, BN], tl.float32)
    dwg = tl.zeros([BC, BN], tl.float32)
    for start in tl.range(split * BM, n_tokens * padded, splits * BM, num_stages=STAGES):
        p = tl.arange(0, BM) + start
        inside, source, dense = pair_rows(p, n_tokens, padded, stride_i, stride_j)
        nx, _, _, _ = load_columns(x_ptr, gamma_x_ptr, beta_x_ptr, p, h, area, eps, H)
        nz, _, _, _ = load_rows(z_ptr, gamma_z_ptr, beta_z_ptr, source, inside, c, eps, C)
        nx = nx.to(dtype)
        nz = nz.to(dtype)
        dy = tl.load(
            dy_ptr + dense[:, None] * C + t[None, :], mask=inside[:, None] & (t < C)[None, :], other=0.0
        ).to(tl.float32)
        linear = tl.dot(nx, wo, input_precision="ieee")
        gate = sigmoid(tl.dot(nz, wg, input_precision="ieee"))
        d_linear = dy * gate
        d_gate = d_linear * linear * (1.0 - gate)
        dwo = tl.dot(tl.trans(nx), d_linear.to(dtype), dwo, input_precision="ieee")
        dwg = tl.dot(tl.trans(nz), d_gate.to(dtype), dwg, input_precision="ieee")
    share = partial_ptr + split.to(tl.int64) * C * (H + C)
    tl.store(share + t[None, :] * H + h[:, None], dwo, mask=real_o)
    tl.store(share + C * H + t[None, :] * C + c[:, None], dwg, mask=real_g)
