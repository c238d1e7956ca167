"""Input gradient of triangle multiplication for Hopper, in Gluon: what `launch.gate_gradient` and `gradients.input_gradient_kernel` compute.

One program holds all four projections' weights in shared memory, where both products read them: that of LN(z), which makes the
linear parts and gates again, and that of their gradients; what the first leaves in registers is the second's operand there, as in
attention. Linear parts and gates of 32 channels are halves of one product's columns; of more, no registers would be left for the
rest. The gradients of a and b, which lie channel by channel, are turned as they are read from shared memory; the gate's, whose
product comes last, the matrix unit reads there as it lies.

What the forward pass kept is given. See `hopper`.
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

from optimized.ops.gluon_parts import (
    CHANNELS,
    HALF,
    PART,
    WHOLE,
    WIDTH,
    ask_for,
    barrier,
    fast_tanh,
    in_halves,
    place_rows,
    sums_of_lanes,
    turned_about,
    widened,
)
from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.hopper import STEP, TILE, place_both, places

GRADIENTS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def fetch_gradients(ptr, into, tile, STEP_AT: gl.constexpr, area, on):
    """Gradients of 64 channels at the positions of a tile, on their way."""
    t = STEP_AT * STEP + gl.arange(0, STEP, gl.SliceLayout(1, GRADIENTS))
    k = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, GRADIENTS))
    async_copy.async_copy_global_to_shared(into, ptr + t.to(gl.int64)[:, None] * area + k[None, :], mask=on)
    async_copy.commit_group()


@gluon.jit
def standardised(z_ptr, stats_ptr, factor, area, p, inside, source, c):
    """factor · (z - mean) · rstd of a tile in fp32, and rstd."""
    rstd = gl.load(stats_ptr + 2 * area + p, mask=inside, other=1.0)
    shift = gl.load(stats_ptr + 3 * area + p, mask=inside, other=0.0) * factor
    z = widened(gl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None], other=0.0))
    return z * (rstd * factor)[:, None] + shift[:, None], rstd


@gluon.jit
def differentiated(linear, gate, grad):
    """Gradients of linear part and gate, doubled, as operands of the next product: see `project.gated_gradients`."""
    d_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    t = fast_tanh(gate)
    d_linear = grad * t + grad
    d_gate = d_linear * (linear - linear * t)
    return gl.convert_layout(d_linear.to(gl.bfloat16), d_l), gl.convert_layout(d_gate.to(gl.bfloat16), d_l)


@gluon.jit
def through_projections(n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet):
    """The gradient to LN(z), doubled, of the projections of a tile; the gate's gradients are on their way then."""
    none = gl.full([TILE, 64], 0.0, gl.float32, PART)
    dn = gl.full([TILE, WIDTH], 0.0, gl.float32, WHOLE)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    for s in gl.static_range(8):
        if s % 2 == 0:
            async_copy.wait_group(1)
            # Into the place of the step before, which every warp has read.
            barrier()
            if s < 4:
                fetch_gradients(grad_ptr, grad_s[(s // 2 + 2) % 3], tile, s // 2 + 2, area, tile >= 0)
            else:
                fetch_gradients(d_gate_ptr, grad_s[(s // 2 + 2) % 3], tile, s // 2 - 2, area, tile >= 0)
        weights = both_s.index(s + none_yet)
        both = warpgroup_mma(n, weights.permute((1, 0)), none, use_acc=False, is_async=True)
        grad = widened(grad_s[s // 2 % 3].slice(s % 2 * 32, 32, 0).permute((1, 0)).load(HALF))
        if s == 0:
            both = warpgroup_mma_wait(0, deps=[both])
        else:  # the products of the step before, which read its gradients from registers, have ended too
            both, n, dn, d_linear, d_gate = warpgroup_mma_wait(
                0,
                deps=[both, n, dn, d_linear, d_gate],  # noqa: F821
            )
        linear, gate = in_halves(both, HALF)
        d_linear, d_gate = differentiated(linear, gate, grad)
        dn = warpgroup_mma(d_linear, weights.slice(0, 32, 0), dn, use_acc=s > 0, is_async=True)
        dn = warpgroup_mma(d_gate, weights.slice(32, 32, 0), dn, is_async=True)
    dn, n, d_linear, d_gate = warpgroup_mma_wait(0, deps=[dn, n, d_linear, d_gate])
    return dn


@gluon.jit
def gradient_tiles(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share_ptr, more_ptr,
    n_tokens, padded, stride_i, stride_j, first, last, both_s, out_gate_s, grad_0, grad_1, grad_2, beta_s, gamma_s,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Every other tile from `first` on, by four warps."""
    none = gl.full([TILE, WIDTH], 0.0, gl.float32, WHOLE)
    sl: gl.constexpr = sums_of_lanes(gl.full([TILE, WIDTH], 0.0, gl.float32, CHANNELS)).type.layout
    area = padded.to(gl.int64) * padded
    grad_s = (grad_0, grad_1, grad_2)
    beta_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    gamma_s.store(gl.full([8, WIDTH], 0.0, gl.float32, sl))
    fetch_gradients(grad_ptr, grad_s[0], first, 0, area, first < last)
    fetch_gradients(grad_ptr, grad_s[1], first, 1, area, first < last)
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    for tile in range(first, last, 2):
        # As large as nothing, and unknown before: addresses of weights would be kept, and spilled, through the loop.
        none_yet = tile >> 28
        following = tile + 2
        p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, CHANNELS))
        inside, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
        keep = inside
        if MASKED:
            keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
        half, _ = standardised(z_ptr, stats_ptr, 0.5, area, p, inside, source, c)
        half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
        n = half * gl.load(gamma_ptr + c).to(gl.float32)[None, :] + half_beta[None, :]
        n = gl.where(keep[:, None], n, 0.0).to(gl.bfloat16)
        gl.store(n_ptr + p.to(gl.int64)[:, None] * WIDTH + c[None, :], n)
        dn = through_projections(n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet)
        # Not sooner: in the time of a whole tile as much passes through the second cache as it holds.
        if EVEN:
            ask_for(z_ptr, following, following < last)
            if MORE:
                ask_for(more_ptr, tile, tile < last)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        of_gate = warpgroup_mma(
            grad_s[1].permute((1, 0)), out_gate_s.index(none_yet), none, use_acc=False, is_async=True
        )
        of_gate = warpgroup_mma(
            grad_s[2].permute((1, 0)), out_gate_s.index(1 + none_yet), of_gate, is_async=True
        )
        fetch_gradients(grad_ptr, grad_s[0], following, 0, area, following < last)
        # z is read again (from L2): keeping the tile would cost its registers through the products.
        normal, rstd = standardised(z_ptr, stats_ptr, 1.0, area, p, inside, source, c)
        of_gate = warpgroup_mma_wait(0, deps=[of_gate])
        barrier()
        fetch_gradients(grad_ptr, grad_s[1], following, 1, area, following < last)
        dn = gl.convert_layout(turned_about(dn), CHANNELS)
        of_gate = gl.convert_layout(turned_about(of_gate), CHANNELS)
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
    columns: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 4], [1, 0])
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, columns))
    gl.store(share_ptr + t, gl.sum(gamma_s.load(columns), 0) * 0.5)
    gl.store(share_ptr + WIDTH + t, gl.sum(beta_s.load(columns), 0) * 0.5)


@gluon.jit(repr=profiled_as("triangle_multiplication_input_gradient_hopper"), do_not_specialize=["group"])
def input_gradient_kernel(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, w_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, norm_partial_ptr,
    more_ptr, n_tokens, padded, stride_i, stride_j, group,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dz of `group` tiles of 64 positions from the gradients of a and b `[256, P, P]` and rstd · d of the gate `[128, P, P]`.

    stats `[5, P, P]` are those of the forward pass, EVEN: N is P and z contiguous. NORMAL: z is x̂ of what dz, in float32, is the
    gradient to, and rstd `[P, P]` that one's. MORE: another gradient of z `[N·N, 128]` is added to dz, in its dtype.
    Also writes mask · n / 2 `[P·P, 128]` for the weight gradients, and two shares of dγ and dβ. Four warps, and four besides.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    banks: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    both_s = gl.allocate_shared_memory(gl.bfloat16, [8, 64, WIDTH], wide)
    out_gate_s = gl.allocate_shared_memory(gl.bfloat16, [2, STEP, WIDTH], wide)
    # An allocation each: between accesses to one a barrier would be put.
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a2 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b2 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    a_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_beta = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    b_gamma = gl.allocate_shared_memory(gl.float32, [8, WIDTH], banks)
    place_both(w_ptr, both_s, wl)
    place_rows(w_ptr, 5 * WIDTH, out_gate_s, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (4 * WIDTH)
    gl.warp_specialize(
        [
            (gradient_tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share, more_ptr, n_tokens, padded, stride_i, stride_j, first, last, both_s, out_gate_s, a0, a1, a2, a_beta, a_gamma, MASKED, EVEN, NORMAL, MORE)),
            (gradient_tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share + 2 * WIDTH, more_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, both_s, out_gate_s, b0, b1, b2, b_beta, b_gamma, MASKED, EVEN, NORMAL, MORE)),
        ],
        [4],
        [240],
    )  # fmt: skip
