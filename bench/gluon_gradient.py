"""Triangle multiplication's input gradient for Hopper with two groups of four warps that do not wait for each other: see `apart_lab`.

What `optimized.ops.triangle_multiplication.hopper_gradient` computes, from the same weights in shared memory. There both groups
meet at a barrier every 64 channels, ask for products at the same time and compute at the same time. Here each takes tiles of 64
positions of its own, so that one may compute while the other's products run.
"""

# ruff: noqa: ANN001, ANN201 (Gluon compiles these functions: an annotation would mean a compile-time constant)
# mypy: ignore-errors
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from optimized.ops.gluon_parts import barrier, fast_tanh
from optimized.ops.triangle_multiplication.hopper import WIDTH
from optimized.ops.triangle_multiplication.hopper_gradient import (
    STEP,
    ask_for,
    fetch_gradients,
    place_weights,
    places,
    standardised,
    sums_of_lanes,
    turned_about,
)

ROWS = gl.constexpr(64)
"""Positions of a tile."""
CHANNELS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
PART = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
WHOLE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
GRADIENTS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FLAT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def differentiated(linear, gate, grad):
    """Gradients of linear part and gate, doubled, as operands of the next product."""
    d_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    grad = grad.to(gl.float32)
    t = fast_tanh(gate)
    d_linear = grad * t + grad
    d_gate = d_linear * (linear - linear * t)
    return gl.convert_layout(d_linear.to(gl.bfloat16), d_l), gl.convert_layout(d_gate.to(gl.bfloat16), d_l)


@gluon.jit
def products_in(n, linear_s, gate_s, none):
    """Halves of linear parts and gates, asked for."""
    linear = warpgroup_mma(n, linear_s.permute((1, 0)), none, use_acc=False, is_async=True)
    return linear, warpgroup_mma(n, gate_s.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def plainly(
    n, dn, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, stride, last, none_yet
):
    """dn of a tile, 64 channels after 64; the last products are still on their way, and what they read from registers."""
    none = gl.full([ROWS, STEP], 0.0, gl.float32, PART)
    grad_s = (grad_0, grad_1, grad_2, grad_3)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    for k in gl.static_range(4):
        async_copy.wait_group(2)
        barrier()
        of_tile = tile + (k + 3) // 4 * stride
        fetch_gradients(grad_ptr, grad_s[(k + 3) % 4], of_tile, (k + 3) % 4, area, GRADIENTS, of_tile < last)
        linear, gate = products_in(n, linear_s.index(k + none_yet), gate_s.index(k + none_yet), none)
        grad = grad_s[k].permute((1, 0)).load(PART)
        if k == 0:
            linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        else:
            linear, gate, n, dn, d_linear, d_gate = warpgroup_mma_wait(
                0,
                deps=[linear, gate, n, dn, d_linear, d_gate],  # noqa: F821
            )
        d_linear, d_gate = differentiated(linear, gate, grad)
        dn = warpgroup_mma(d_linear, linear_s.index(k + none_yet), dn, use_acc=k > 0, is_async=True)
        dn = warpgroup_mma(d_gate, gate_s.index(k + none_yet), dn, is_async=True)
    return dn, d_linear, d_gate


@gluon.jit
def halves(
    n, dn, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, stride, last, none_yet
):
    """The same, 32 channels after 32: fewer registers."""
    none = gl.full([ROWS, 32], 0.0, gl.float32, HALF)
    grad_s = (grad_0, grad_1, grad_2, grad_3)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, HALF, 2))
    for s in gl.static_range(8):
        if s % 2 == 0:
            async_copy.wait_group(2)
            barrier()
            of_tile = tile + (s // 2 + 3) // 4 * stride
            fetch_gradients(
                grad_ptr, grad_s[(s // 2 + 3) % 4], of_tile, (s // 2 + 3) % 4, area, GRADIENTS, of_tile < last
            )
        of_linear = linear_s.index(s // 2 + none_yet).slice(s % 2 * 32, 32, 0)
        of_gate = gate_s.index(s // 2 + none_yet).slice(s % 2 * 32, 32, 0)
        linear, gate = products_in(n, of_linear, of_gate, none)
        grad = grad_s[s // 2].slice(s % 2 * 32, 32, 0).permute((1, 0)).load(HALF)
        if s == 0:
            linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
        else:
            linear, gate, n, dn, d_linear, d_gate = warpgroup_mma_wait(
                0,
                deps=[linear, gate, n, dn, d_linear, d_gate],  # noqa: F821
            )
        d_linear, d_gate = differentiated(linear, gate, grad)
        dn = warpgroup_mma(d_linear, of_linear, dn, use_acc=s > 0, is_async=True)
        dn = warpgroup_mma(d_gate, of_gate, dn, is_async=True)
    return dn, d_linear, d_gate


@gluon.jit
def ahead(
    n, dn, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, stride, last, none_yet
):
    """The same, 32 channels after 32: the next ones' products are asked for before these are differentiated."""
    none = gl.full([ROWS, 32], 0.0, gl.float32, HALF)
    grad_s = (grad_0, grad_1, grad_2, grad_3)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, HALF, 2))
    next_linear, next_gate = products_in(
        n, linear_s.index(0 + none_yet).slice(0, 32, 0), gate_s.index(0 + none_yet).slice(0, 32, 0), none
    )
    for s in gl.static_range(8):
        if s % 2 == 0:
            async_copy.wait_group(2)
            barrier()
            of_tile = tile + (s // 2 + 3) // 4 * stride
            fetch_gradients(
                grad_ptr, grad_s[(s // 2 + 3) % 4], of_tile, (s // 2 + 3) % 4, area, GRADIENTS, of_tile < last
            )
        linear, gate = next_linear, next_gate
        if s < 7:
            next_linear, next_gate = products_in(
                n,
                linear_s.index((s + 1) // 2 + none_yet).slice((s + 1) % 2 * 32, 32, 0),
                gate_s.index((s + 1) // 2 + none_yet).slice((s + 1) % 2 * 32, 32, 0),
                none,
            )
        grad = grad_s[s // 2].slice(s % 2 * 32, 32, 0).permute((1, 0)).load(HALF)
        # All but the products of the step before and those just asked for have ended.
        if s < 2:
            linear, gate = warpgroup_mma_wait(2 + 2 * s, deps=[linear, gate])
        else:
            linear, gate, n, older_linear, older_gate = warpgroup_mma_wait(
                4 if s < 7 else 2,
                deps=[linear, gate, n, older_linear, older_gate],  # noqa: F821
            )
        if s > 0:
            older_linear, older_gate = d_linear, d_gate  # noqa: F821
        d_linear, d_gate = differentiated(linear, gate, grad)
        of_linear = linear_s.index(s // 2 + none_yet).slice(s % 2 * 32, 32, 0)
        of_gate = gate_s.index(s // 2 + none_yet).slice(s % 2 * 32, 32, 0)
        dn = warpgroup_mma(d_linear, of_linear, dn, use_acc=s > 0, is_async=True)
        dn = warpgroup_mma(d_gate, of_gate, dn, is_async=True)
    # What is left of the step before the last.
    dn, older_linear, older_gate = warpgroup_mma_wait(2, deps=[dn, older_linear, older_gate])
    return dn, d_linear, d_gate


@gluon.jit
def tiles(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, dn_gate_ptr, dz_ptr, n_ptr, share_ptr, more_ptr,
    n_tokens, padded, stride_i, stride_j, first, last, linear_s, gate_s, grad_0, grad_1, grad_2, grad_3, beta_s, gamma_s,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, FORM: gl.constexpr,
):  # fmt: skip
    """Every other tile from `first` on, by four warps."""
    zero = gl.full([ROWS, WIDTH], 0.0, gl.float32, WHOLE)
    sl: gl.constexpr = sums_of_lanes(gl.full([ROWS, WIDTH], 0.0, gl.float32, CHANNELS)).type.layout
    area = padded.to(gl.int64) * padded
    beta_s.store(gl.full([16, WIDTH], 0.0, gl.float32, sl))
    gamma_s.store(gl.full([16, WIDTH], 0.0, gl.float32, sl))
    fetch_gradients(grad_ptr, grad_0, first, 0, area, GRADIENTS, first < last)
    fetch_gradients(grad_ptr, grad_1, first, 1, area, GRADIENTS, first < last)
    fetch_gradients(grad_ptr, grad_2, first, 2, area, GRADIENTS, first < last)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    line = gl.arange(0, 128, FLAT)
    for tile in range(first, last, 2):
        start = tile * ROWS
        if EVEN:
            later = (start + 2 * ROWS).to(gl.int64) * WIDTH + line * 64
            ask_for(z_ptr + later, (line >= 0) & (tile + 2 < last))
            ask_for(dn_gate_ptr + later, (line >= 0) & (tile + 2 < last))
        p = start + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
        keep = inside
        if MASKED:
            keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
        normal, _ = standardised(z_ptr, stats_ptr, area, p, inside, source, c)
        half_gamma = 0.5 * gl.load(gamma_ptr + c).to(gl.float32)
        half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
        n = normal * half_gamma[None, :] + half_beta[None, :]
        n = gl.where(keep[:, None], n, 0.0).to(gl.bfloat16)
        square = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        gl.store(n_ptr + square, n)
        if FORM == 2:
            dn, d_linear, d_gate = ahead(n, zero, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, 2, last, tile >> 28)  # fmt: skip
        elif FORM == 1:
            dn, d_linear, d_gate = halves(n, zero, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, 2, last, tile >> 28)  # fmt: skip
        else:
            dn, d_linear, d_gate = plainly(n, zero, grad_0, grad_1, grad_2, grad_3, linear_s, gate_s, grad_ptr, area, tile, 2, last, tile >> 28)  # fmt: skip
        normal, rstd = standardised(z_ptr, stats_ptr, area, p, inside, source, c)
        of_gate = gl.load(dn_gate_ptr + square, mask=inside[:, None], other=0.0).to(gl.float32)
        dn, d_linear, d_gate = warpgroup_mma_wait(0, deps=[dn, d_linear, d_gate])
        dn = gl.convert_layout(turned_about(dn), CHANNELS)
        dn = gl.where(keep[:, None], dn, 0.0) + of_gate * (2.0 / rstd)[:, None]
        beta_s.store(beta_s.load(sl) + sums_of_lanes(dn))
        gamma_s.store(gamma_s.load(sl) + sums_of_lanes(dn * normal))
        dn = dn * gl.load(gamma_ptr + c).to(gl.float32)[None, :]
        mean = gl.sum(dn, 1) * (1.0 / WIDTH)
        slope = gl.sum(dn * normal, 1) * (1.0 / WIDTH)
        if NORMAL:
            rstd = gl.load(rstd_ptr + p, mask=inside, other=1.0)
        dz = (dn - mean[:, None] - normal * slope[:, None]) * (0.5 * rstd)[:, None]
        cells = cell[:, None] * WIDTH + c[None, :]
        if MORE:
            dz += gl.load(more_ptr + cells, mask=inside[:, None], other=0.0).to(gl.float32)
        gl.store(dz_ptr + cells, dz.to(dz_ptr.dtype.element_ty), mask=inside[:, None])
    async_copy.wait_group(0)
    barrier()
    columns: gl.constexpr = gl.BlockedLayout([16, 1], [1, 32], [1, 4], [1, 0])
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, columns))
    gl.store(share_ptr + t, gl.sum(gamma_s.load(columns), 0) * 0.5)
    gl.store(share_ptr + WIDTH + t, gl.sum(beta_s.load(columns), 0) * 0.5)


@gluon.jit(do_not_specialize=["group"])
def apart_kernel(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, w_ptr, mask_ptr, grad_ptr, dn_gate_ptr, dz_ptr, n_ptr, norm_partial_ptr,
    more_ptr, n_tokens, padded, stride_i, stride_j, group,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, FORM: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `hopper_gradient.input_gradient_kernel`, of `group` tiles of 64 positions; four warps, and four besides. Two shares a program.

    NORMAL: z is x̂ of what dz is the gradient to, in float32 as is `more`, and rstd `[P, P]` that one's.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    banks: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    linear_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    gate_s = gl.allocate_shared_memory(gl.bfloat16, [4, STEP, WIDTH], wide)
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    a2 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    a3 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b2 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    b3 = gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide)
    a_beta = gl.allocate_shared_memory(gl.float32, [16, WIDTH], banks)
    a_gamma = gl.allocate_shared_memory(gl.float32, [16, WIDTH], banks)
    b_beta = gl.allocate_shared_memory(gl.float32, [16, WIDTH], banks)
    b_gamma = gl.allocate_shared_memory(gl.float32, [16, WIDTH], banks)
    place_weights(w_ptr, linear_s, 0, wl)
    place_weights(w_ptr, gate_s, 2 * WIDTH, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // ROWS)
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (4 * WIDTH)
    gl.warp_specialize(
        [
            (tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, dn_gate_ptr, dz_ptr, n_ptr, share, more_ptr, n_tokens, padded, stride_i, stride_j, first, last, linear_s, gate_s, a0, a1, a2, a3, a_beta, a_gamma, MASKED, EVEN, NORMAL, MORE, FORM)),
            (tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, dn_gate_ptr, dz_ptr, n_ptr, share + 2 * WIDTH, more_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, linear_s, gate_s, b0, b1, b2, b3, b_beta, b_gamma, MASKED, EVEN, NORMAL, MORE, FORM)),
        ],
        [4],
        [240],
    )  # fmt: skip
