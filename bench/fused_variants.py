# ruff: noqa
"""Variants of the transition forward kernel, to learn what bounds it. Not shipped."""

import triton
import triton.language as tl

from optimized.ops.rows import normalise_rows, sigmoid


@triton.jit
def tanh_sigmoid(x):
    t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x * 0.5], dtype=tl.float32, is_pure=True, pack=1)
    return 0.5 * t + 0.5


@triton.jit
def forward_variant(
    x_ptr, gamma_ptr, beta_ptr, wa_ptr, wb_ptr, wo_ptr, out_ptr, rows, eps,
    C: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, ACT: tl.constexpr, NORM: tl.constexpr, SPECIALISE: tl.constexpr,
):  # fmt: skip
    dtype = wa_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    inside = (m < rows)[:, None]
    tile = m[:, None] * C + c[None, :]
    x = tl.load(x_ptr + tile, mask=inside, other=0.0)
    if NORM:
        gamma = tl.load(gamma_ptr + c).to(tl.float32)
        beta = tl.load(beta_ptr + c).to(tl.float32)
        normal, _ = normalise_rows(x.to(tl.float32), c, eps, C)
        n = (normal * gamma[None, :] + beta[None, :]).to(dtype)
    else:
        n = x
    acc = tl.zeros([BM, BC], tl.float32)
    j = tl.arange(0, BN)
    wide = j[:, None] * C + c[None, :]
    tall = c[:, None] * H + j[None, :]
    if AHEAD:
        a = tl.dot(n, tl.trans(tl.load(wa_ptr + wide)))
        b = tl.dot(n, tl.trans(tl.load(wb_ptr + wide)))
        for start in tl.range(0, H, BN, num_stages=STAGES):
            following = (start + BN) % H
            wa = tl.load(wa_ptr + following * C + wide)
            wb = tl.load(wb_ptr + following * C + wide)
            wo = tl.load(wo_ptr + start + tall)
            a_next = tl.dot(n, tl.trans(wa))
            b_next = tl.dot(n, tl.trans(wb))
            h = (a * (tanh_sigmoid(a) if ACT == 1 else sigmoid(a)) * b).to(dtype)
            acc = tl.dot(h, tl.trans(wo), acc)
            a = a_next
            b = b_next
    else:
        for start in tl.range(0, H, BN, num_stages=STAGES, warp_specialize=SPECIALISE):
            wa = tl.load(wa_ptr + start * C + wide)
            wb = tl.load(wb_ptr + start * C + wide)
            wo = tl.load(wo_ptr + start + tall)
            a = tl.dot(n, tl.trans(wa))
            b = tl.dot(n, tl.trans(wb))
            if ACT == 2:
                h = (a * b).to(dtype)
            elif ACT == 1:
                h = (a * tanh_sigmoid(a) * b).to(dtype)
            else:
                h = (a * sigmoid(a) * b).to(dtype)
            acc = tl.dot(h, tl.trans(wo), acc)
    tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=inside)
