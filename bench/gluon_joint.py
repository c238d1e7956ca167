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
    mbarrier,
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
    sums_of_lanes,
)
from optimized.ops.triangle_multiplication.hopper_project import (
    PLANES,
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
def widened(x):
    """x, in bf16, in fp32: pairs that lie in one register take two instructions."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }",
        "=f,=f,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def in_halves(x, layout: gl.constexpr):
    """The left and the right half of the columns: a view of what each lane holds."""
    columns: gl.constexpr = x.shape[1] // 2
    left, right = gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, columns)), (0, 2, 1)))
    return gl.convert_layout(left, layout, assert_trivial=True), gl.convert_layout(
        right, layout, assert_trivial=True
    )


HALVES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 16], [0, 32], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
"""Of rows in CHANNELS, as pairs of channels in 32 bits."""


@gluon.jit
def load_pairs(
    z_ptr, mask_ptr, stats_ptr, tile, n_tokens, padded, stride_i, stride_j, on,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr,
):  # fmt: skip
    """Rows of z of a tile, pairs of channels in 32 bits, outside the real square any row, and what the mask says of them.

    GIVEN: rstd, zero where a position is left out, and shift instead of what the mask says, twice.
    """
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, HALVES))
    c = gl.arange(0, WIDTH // 2, gl.SliceLayout(0, HALVES))
    _, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
    rows = z_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (source // 2)[:, None]
    z = gl.load(rows + c[None, :], mask=on)
    if GIVEN:
        area = padded.to(gl.int64) * padded
        kept = gl.load(stats_ptr + 2 * area + p, mask=on, other=0.0)
        shift = gl.load(stats_ptr + area + p, mask=on, other=0.0)
    else:
        kept = gl.load(mask_ptr + cell, mask=on, other=0).to(gl.int1) if MASKED else on
        shift = kept
    return z, kept, shift


@gluon.jit
def standard(z, kept, shift, stats_ptr, tile, n_tokens, padded, eps, EVEN: gl.constexpr, GIVEN: gl.constexpr):  # fmt: skip
    """(z - mean) · rstd of a tile in bf16, zero where a position is left out, and which are not.

    By statistics that are given; or else they go to memory.
    """
    left = (z << 16).to(gl.float32, bitcast=True)
    right = (z & -65536).to(gl.float32, bitcast=True)
    if GIVEN:
        keep = kept != 0
        shift = gl.where(keep, shift, 0.0)[:, None]
        left, right = left * kept[:, None] + shift, right * kept[:, None] + shift
    else:
        p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(1, HALVES))
        area = padded.to(gl.int64) * padded
        inside, _, _ = places(p, n_tokens, padded, 0, 0, EVEN)
        keep = inside & kept
        mean = gl.sum(left + right, 1) * (1.0 / WIDTH)
        left, right = left - mean[:, None], right - mean[:, None]
        squares = gl.sum(left * left, 1) + gl.sum(
            right * right, 1
        )  # apart, to be summed as they are multiplied
        rstd = gl.rsqrt(squares * (1.0 / WIDTH) + eps)
        of_kept = gl.where(keep, rstd, 0.0)
        gl.store(stats_ptr + p, gl.where(inside, rstd, 0.0))
        gl.store(stats_ptr + area + p, gl.where(inside, -mean * rstd, 0.0))
        gl.store(stats_ptr + 2 * area + p, of_kept)
        left, right = left * of_kept[:, None], right * of_kept[:, None]
    n = gl.reshape(gl.join(left, right), (TILE, WIDTH))
    return gl.convert_layout(n, CHANNELS, assert_trivial=True).to(gl.bfloat16), keep


@gluon.jit
def place_biases(sums_ptr, into, layout: gl.constexpr):
    """In bf16 what rounding leaves of β · w beside it, in the order of `place_both`."""
    parts: gl.constexpr = into.shape[0]
    step: gl.constexpr = into.shape[1] // 2
    e = gl.arange(0, 16, gl.SliceLayout(0, layout))
    for k in gl.static_range(parts):
        r = gl.arange(0, 2 * step, gl.SliceLayout(1, layout))
        bias = gl.load(sums_ptr + r // step * (2 * WIDTH) + k * step + r % step + 4 * WIDTH)
        high = bias.to(gl.bfloat16).to(gl.float32)
        value = gl.where((e == 1)[None, :], (bias - high)[:, None], high[:, None])
        into.index(k).store(gl.where((e < 2)[None, :], value, 0.0).to(gl.bfloat16))


@gluon.jit
def put(stage, out_ptr, tile, k, padded, on):
    """64 channels of a tile from shared memory to a and b."""
    t = gl.arange(0, STEP, gl.SliceLayout(1, PLANES))
    p = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, PLANES))
    into = out_ptr + (k * STEP + t).to(gl.int64)[:, None] * (padded.to(gl.int64) * padded) + p[None, :]
    gl.store(into, stage.load(PLANES), mask=on)


@gluon.jit
def my_turn(mine, turn, LEADS: gl.constexpr, TURNS: gl.constexpr):
    """Wait until the other group's products of the turn before have been asked for, or, TURNS 2, have ended."""
    if TURNS > 0:
        mbarrier.wait(mine, (turn + (1 if LEADS else 0)) & 1)


@gluon.jit
def your_turn(theirs, NOW: gl.constexpr):
    """Let the other group ask for products."""
    if NOW:
        mbarrier.arrive(theirs, count=1)


@gluon.jit
def see_out(mine, theirs, left, turns: gl.constexpr, TURNS: gl.constexpr):
    """Take part in the turns of the other group's last tile, if it has one more: `left` tiles from the own first on."""
    if TURNS > 0:
        for _ in range(gl.maximum(left + 1, 0) % 2):
            for k in gl.static_range(turns):
                my_turn(mine, left // 2 * turns + k, False, TURNS)
                your_turn(theirs, True)


@gluon.jit
def project_tiles(
    z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps,
    both_s, of_both_s, stage_0, stage_1, mine, theirs,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, TURNS: gl.constexpr, LEADS: gl.constexpr,
):  # fmt: skip
    """As there. Results leave shared memory while the next channels' product runs. TURNS: groups ask for products in turns."""
    z_l: gl.constexpr = gl.DotOperandLayout(0, WHOLE, 2)
    none = gl.full([TILE, 2 * STEP], 0.0, gl.float32, WHOLE)
    stage_s = (stage_0, stage_1)
    e = gl.arange(0, 16, gl.SliceLayout(0, BESIDE))
    z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, first, n_tokens, padded, stride_i, stride_j, first < last, EVEN, MASKED, GIVEN)  # fmt: skip
    for tile in range(first, last, 2):
        none_yet = tile >> 28
        n, keep = standard(z, kept, shift, stats_ptr, tile, n_tokens, padded, eps, EVEN, GIVEN)
        operand = gl.convert_layout(turned_about(n), z_l)
        keep = gl.convert_layout(keep, gl.SliceLayout(1, BESIDE), assert_trivial=True)
        ones = gl.where((e < 2)[None, :] & keep[:, None], 1.0, 0.0).to(gl.bfloat16)
        ones = gl.convert_layout(ones, z_l)
        z, kept, shift = load_pairs(z_ptr, mask_ptr, stats_ptr, tile + 2, n_tokens, padded, stride_i, stride_j, tile + 2 < last, EVEN, MASKED, GIVEN)  # fmt: skip
        for k in gl.static_range(4):
            at = k + none_yet
            my_turn(mine, k, LEADS, TURNS)
            both = warpgroup_mma(
                operand, both_s.index(at).permute((1, 0)), none, use_acc=False, is_async=True
            )
            both = warpgroup_mma(ones, of_both_s.index(at).permute((1, 0)), both, is_async=True)
            your_turn(theirs, TURNS == 1)
            barrier()
            if k == 0:
                put(stage_s[1], out_ptr, tile - 2, 3, padded, tile > first)
            else:
                put(stage_s[(k - 1) % 2], out_ptr, tile, k - 1, padded, tile >= 0)
            both, operand, ones = warpgroup_mma_wait(0, deps=[both, operand, ones])
            your_turn(theirs, TURNS == 2)
            linear, gate = in_halves(both, PART)
            value = (linear * fast_tanh(gate) + linear).to(gl.bfloat16)
            stage_s[k % 2].permute((1, 0)).store(value)
    barrier()
    put(stage_s[1], out_ptr, first + (last - 1 - first) // 2 * 2, 3, padded, first < last)
    if not LEADS:
        see_out(mine, theirs, last - first, 4, TURNS)


@gluon.jit(do_not_specialize=["group"])
def project_kernel(
    z_ptr, mask_ptr, stats_ptr, w_ptr, sums_partial_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, group, eps,
    EVEN: gl.constexpr, MASKED: gl.constexpr, GIVEN: gl.constexpr, TURNS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As there, from rows standardised in bf16."""
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
    a_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(a_turn, count=1)
    mbarrier.init(b_turn, count=1)
    place_both(w_ptr, both_s, wl)
    place_biases(sums_partial_ptr, of_both_s, bl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    gl.warp_specialize(
        [
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first, last, eps, both_s, of_both_s, a0, a1, a_turn, b_turn, EVEN, MASKED, GIVEN, TURNS, True)),
            (project_tiles, (z_ptr, mask_ptr, stats_ptr, out_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, eps, both_s, of_both_s, b0, b1, b_turn, a_turn, EVEN, MASKED, GIVEN, TURNS, False)),
        ],
        [4],
        [240],
    )  # fmt: skip


@gluon.jit
def standardised(z_ptr, stats_ptr, factor, area, p, inside, source, c):
    """factor · (z - mean) · rstd of a tile in fp32, and rstd."""
    rstd = gl.load(stats_ptr + 2 * area + p, mask=inside, other=1.0)
    shift = gl.load(stats_ptr + 3 * area + p, mask=inside, other=0.0) * factor
    z = widened(gl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None], other=0.0))
    return z * (rstd * factor)[:, None] + shift[:, None], rstd


@gluon.jit
def through_projections(
    n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet, mine, theirs, turn, LEADS: gl.constexpr, TURNS: gl.constexpr
):  # fmt: skip
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
        if s == 0:
            my_turn(mine, turn, LEADS, TURNS)
        both = warpgroup_mma(n, weights.permute((1, 0)), none, use_acc=False, is_async=True)
        your_turn(theirs, TURNS == 1)
        grad = widened(grad_s[s // 2 % 3].slice(s % 2 * 32, 32, 0).permute((1, 0)).load(HALF))
        if s == 0:
            both = warpgroup_mma_wait(0, deps=[both])
        else:
            both, n, dn, d_linear, d_gate = warpgroup_mma_wait(
                0,
                deps=[both, n, dn, d_linear, d_gate],  # noqa: F821
            )
        your_turn(theirs, TURNS == 2)
        linear, gate = in_halves(both, HALF)
        d_linear, d_gate = differentiated(linear, gate, grad)
        my_turn(mine, turn + s + 1, LEADS, TURNS)
        dn = warpgroup_mma(d_linear, weights.slice(0, 32, 0), dn, use_acc=s > 0, is_async=True)
        dn = warpgroup_mma(d_gate, weights.slice(32, 32, 0), dn, is_async=True)
    your_turn(theirs, TURNS == 1)
    dn, n, d_linear, d_gate = warpgroup_mma_wait(0, deps=[dn, n, d_linear, d_gate])
    your_turn(theirs, TURNS == 2)
    return dn


@gluon.jit
def gradient_tiles(
    z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share_ptr, more_ptr,
    n_tokens, padded, stride_i, stride_j, first, last, both_s, out_gate_s, grad_0, grad_1, grad_2, beta_s, gamma_s, mine, theirs,
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, TURNS: gl.constexpr, LEADS: gl.constexpr,
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
        normal, _ = standardised(z_ptr, stats_ptr, 0.5, area, p, inside, source, c)
        half_beta = 0.5 * gl.load(beta_ptr + c).to(gl.float32)
        n = normal * gl.load(gamma_ptr + c).to(gl.float32)[None, :] + half_beta[None, :]
        n = gl.where(keep[:, None], n, 0.0).to(gl.bfloat16)
        gl.store(n_ptr + p.to(gl.int64)[:, None] * WIDTH + c[None, :], n)
        dn = through_projections(n, grad_ptr, d_gate_ptr, both_s, grad_s, area, tile, none_yet, mine, theirs, (tile - first) // 2 * 9, LEADS, TURNS)  # fmt: skip
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
    if not LEADS:
        see_out(mine, theirs, last - first, 9, TURNS)
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
    MASKED: gl.constexpr, EVEN: gl.constexpr, NORMAL: gl.constexpr, MORE: gl.constexpr, TURNS: gl.constexpr, num_warps: gl.constexpr,
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
    a_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b_turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(a_turn, count=1)
    mbarrier.init(b_turn, count=1)
    place_both(w_ptr, both_s, wl)
    place_weights(w_ptr, out_gate_s, 5 * WIDTH, wl)
    fence_async_shared()
    barrier()
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, (padded * padded) // TILE)
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (4 * WIDTH)
    gl.warp_specialize(
        [
            (gradient_tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share, more_ptr, n_tokens, padded, stride_i, stride_j, first, last, both_s, out_gate_s, a0, a1, a2, a_beta, a_gamma, a_turn, b_turn, MASKED, EVEN, NORMAL, MORE, TURNS, True)),
            (gradient_tiles, (z_ptr, stats_ptr, rstd_ptr, gamma_ptr, beta_ptr, mask_ptr, grad_ptr, d_gate_ptr, dz_ptr, n_ptr, share + 2 * WIDTH, more_ptr, n_tokens, padded, stride_i, stride_j, first + 1, last, both_s, out_gate_s, b0, b1, b2, b_beta, b_gamma, b_turn, a_turn, MASKED, EVEN, NORMAL, MORE, TURNS, False)),
        ],
        [4],
        [240],
    )  # fmt: skip
