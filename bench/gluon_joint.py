"""Triangle multiplication's projections and their gradient for Hopper with linear parts and gates from one product: see `joint_lab`.

What `hopper_project` and `hopper_gradient` of `optimized.ops.triangle_multiplication` compute. There two products of 64 or of 32
columns read the same rows from registers; here one of twice as many, of whose columns half are the linear parts' and half the gates'.
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
    BESIDE,
    CHANNELS,
    WHOLE,
    WIDTH,
    barrier,
    fast_tanh,
    place_weights,
    turned_about,
    value_of,
)
from optimized.ops.triangle_multiplication.hopper import PART, STEP, TILE, places
from optimized.ops.triangle_multiplication.hopper_gradient import (
    FLAT,  # noqa: F401 (`ask_for` has it)
    HALF,
    ask_for,
    differentiated,
    fetch_gradients,
    standardised,
    sums_of_lanes,
)
from optimized.ops.triangle_multiplication.hopper_project import (
    PLANES,
    in_turns,
    load_tile,
    take,
)


@gluon.jit
def place_both(w_ptr, into, layout: gl.constexpr):
    """Some rows at a time of the linear parts' weights, and as many of the gates'; columns as products have them."""
    parts: gl.constexpr = into.shape[0]
    step: gl.constexpr = into.shape[1] // 2
    for k in gl.static_range(parts):
        r = gl.arange(0, 2 * step, gl.SliceLayout(1, layout))
        t = r // step * (2 * WIDTH) + k * step + r % step
        c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))


@gluon.jit
def place_both_beside(sums_ptr, into, layout: gl.constexpr):
    """As `hopper_project.place_beside`, in the order of `place_both`."""
    parts: gl.constexpr = into.shape[0]
    step: gl.constexpr = into.shape[1] // 2
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    for k in gl.static_range(parts):
        r = gl.arange(0, 2 * step, gl.SliceLayout(1, layout))
        rows = sums_ptr + r // step * (2 * WIDTH) + k * step + r % step
        biases, sums = gl.load(rows + 4 * WIDTH), gl.load(rows)
        into.index(k).store((in_turns(biases, e, 2) + in_turns(sums, e - 3, 2)).to(gl.bfloat16))


@gluon.jit
def in_halves(x, layout: gl.constexpr):
    """The left and the right half of the columns: a view of what each lane holds."""
    columns: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, columns)), (0, 2, 1)))
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(
        right, layout, assert_trivial=True
    )


@gluon.jit
def products_in(operand, moments, both_s, of_both_s, at, none):
    """Linear parts and gates of 64 channels, asked for."""
    both = warpgroup_mma(operand, both_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(moments, of_both_s.index(at).permute((1, 0)), both, is_async=True)


@gluon.jit
def project_tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps,
    both_s, of_both_s, stage_0, stage_1, EVEN: gl.constexpr, MASKED: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """As there. AHEAD: the next channels' product is asked for before these are gated."""
    z_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    beside: gl.constexpr = gl.SliceLayout(1, BESIDE)
    none = gl.full([TILE, 2 * STEP], 0.0, gl.float32, WHOLE)
    stage_s = (stage_0, stage_1)
    area = padded.to(gl.int64) * padded
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    t = gl.arange(0, STEP, gl.SliceLayout(1, PLANES))
    z, kept = load_tile(z_ptr, mask_ptr, first, n_tokens, padded, stride_i, stride_j, EVEN, MASKED, first < last)  # fmt: skip
    for tile in range(first, last, 2):
        none_yet = tile >> 28
        deviation, less_mean, rstd = take(z, kept, stats_ptr, tile, n_tokens, padded, eps, EVEN)
        deviation = gl.convert_layout(deviation, beside, assert_trivial=True)
        less_mean = gl.convert_layout(less_mean, beside, assert_trivial=True)
        moments = (in_turns(deviation, e, 1) + in_turns(less_mean, e - 3, 1)).to(gl.bfloat16)
        moments = gl.convert_layout(moments, z_l)
        operand = gl.convert_layout(turned_about(z), z_l)
        z, kept = load_tile(z_ptr, mask_ptr, tile + 2, n_tokens, padded, stride_i, stride_j, EVEN, MASKED, tile + 2 < last)  # fmt: skip
        rstd = gl.convert_layout(rstd, gl.SliceLayout(1, PART), assert_trivial=True)[:, None]
        if AHEAD:
            following = products_in(operand, moments, both_s, of_both_s, none_yet, none)
        for k in gl.static_range(4):
            if AHEAD:
                both = following
                if k < 3:
                    following = products_in(operand, moments, both_s, of_both_s, k + 1 + none_yet, none)
            else:
                both = products_in(operand, moments, both_s, of_both_s, k + none_yet, none)
            # All but the two just asked for have ended.
            both, operand, moments = warpgroup_mma_wait(
                2 if AHEAD and k < 3 else 0, deps=[both, operand, moments]
            )
            linear, gate = in_halves(both, PART)
            linear = linear * rstd
            value = (linear * fast_tanh(gate * rstd) + linear).to(gl.bfloat16)
            stage_s[k % 2].permute((1, 0)).store(value)
            barrier()
            p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, PLANES))
            into = out_ptr + (k * STEP + t).to(gl.int64)[:, None] * area + p[None, :]
            gl.store(into, stage_s[k % 2].load(PLANES))


@gluon.jit(do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, folded_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, AHEAD: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As there."""
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    bl: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [num_warps, 1], [1, 0])
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    thin: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    both_s = gl.allocate_shared_memory(gl.bfloat16, [4, 2 * STEP, WIDTH], wide)
    of_both_s = gl.allocate_shared_memory(gl.bfloat16, [4, 2 * STEP, 16], thin)
    a0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    a1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b0 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    b1 = gl.allocate_shared_memory(gl.bfloat16, [STEP, TILE], wide)
    place_both(folded_ptr, both_s, wl)
    place_both_beside(sums_partial_ptr, of_both_s, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    gl.warp_specialize(
        [
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, EVEN, MASKED, AHEAD)),
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, EVEN, MASKED, AHEAD)),
        ],
        [4],
        [240],
    )  # fmt: skip


@gluon.jit
def through_projections(n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet):
    """As there."""
    none = gl.full([TILE, 64], 0.0, gl.float32, PART)
    dn = gl.full([TILE, WIDTH], 0.0, gl.float32, WHOLE)
    n = gl.convert_layout(turned_about(n), gl.DotOperandLayout(0, PART, 2))
    for s in gl.static_range(8):
        if s % 2 == 0:
            async_copy.wait_group(1)
            barrier()
            if s < 4:
                fetch_gradients(grad_ptr, grad_s[(s // 2 + 2) % 3], tile, s // 2 + 2, area, tile >= 0)
            else:
                fetch_gradients(d_gate_ptr, grad_s[(s // 2 + 2) % 3], tile, s // 2 - 2, area, tile >= 0)
        weights = both_s.index(s + none_yet)
        both = warpgroup_mma(n, weights.permute((1, 0)), none, use_acc=False, is_async=True)
        grad = grad_s[s // 2 % 3].slice(s % 2 * 32, 32, 0).permute((1, 0)).load(HALF)
        if s == 0:
            both = warpgroup_mma_wait(0, deps=[both])
        else:
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
    """As there."""
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
        none_yet = tile >> 28
        following = tile + 2
        if EVEN:
            ask_for(z_ptr, following, following < last)
            if MORE:
                ask_for(more_ptr, following, following < last)
        p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, CHANNELS))
        inside, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
        keep = inside
        if MASKED:
            keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
        normal, _ = standardised(z_ptr, stats_ptr, area, p, inside, source, c)
        half_gamma = 0.5 * gl.load(gamma_ptr + c).to(gl.float32)
        half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
        n = normal * half_gamma[None, :] + half_beta[None, :]
        n = gl.where(keep[:, None], n, 0.0).to(gl.bfloat16)
        gl.store(n_ptr + p.to(gl.int64)[:, None] * WIDTH + c[None, :], n)
        dn = through_projections(n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet)
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
        normal, rstd = standardised(z_ptr, stats_ptr, area, p, inside, source, c)
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


@gluon.jit(do_not_specialize=["group"])
def input_gradient_kernel(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, w_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, norm_partial_ptr,
    more_ptr, n_tokens, padded, stride_i, stride_j, group,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As there."""
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
    place_weights(w_ptr, out_gate_s, 5 * WIDTH, wl)
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
