"""Input gradient of triangle multiplication's projections for Hopper, in Gluon: what `gradients.input_gradient_kernel` computes.

One program holds all four projections' weights in shared memory, where both products read them: that of LN(z), which makes the
linear parts and gates again, and that of their gradients. Positions are the rows of both, so that what the first leaves in
registers is the second's operand there, as in attention; the gradients of a and b, which lie channel by channel, are turned as
they are read from shared memory.

Columns of the weights lie in shared memory in such an order that the values of a lane are eight channels one after another,
twice four times: every tensor of rows goes from memory to registers and back 16 bytes a lane, 64 of four lanes.

bf16, 128 channels of z and of the contraction, sm_90; what the forward pass kept is given.
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
from optimized.ops.names import profiled_as
from optimized.ops.triangle_multiplication.hopper import WIDTH, pair_of, value_of

ROWS = gl.constexpr(128)
"""Positions of a tile: 64 for each group of four warps."""
STEP = gl.constexpr(64)
"""Channels of a and b at a time."""
STEPS = gl.constexpr(4)
"""Times that make all 256. Gradients of three are on their way while those of one are in use."""
CHANNELS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 128],
    )
)
"""The products' layout with columns as channels: eight of a lane one after another, and four lanes beside each other."""


@gluon.jit
def turned_about(x):
    """`[rows, 128]` of columns as products have them, as channels; or the other way: a view of what each lane holds."""
    return gl.reshape(gl.permute(gl.reshape(x, (x.shape[0], 4, 4, 4, 2)), (0, 1, 3, 2, 4)), (x.shape[0], 128))


@gluon.jit
def place_weights(w_ptr, into, first, layout: gl.constexpr):
    """64 rows at a time of the weights, from row `first` on, columns as products have them."""
    for k in gl.static_range(4):
        t = first + k * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
        c = value_of(gl.arange(0, WIDTH, gl.SliceLayout(0, layout)))
        into.index(k).store(gl.load(w_ptr + t[:, None] * WIDTH + c[None, :]))


@gluon.jit
def fetch_gradients(grad_ptr, into, tile, STEP_AT: gl.constexpr, area, layout: gl.constexpr, on):
    """Gradients of 64 channels of a and b at the positions of a tile, as many as there is room for, on their way."""
    t = STEP_AT * STEP + gl.arange(0, STEP, gl.SliceLayout(1, layout))
    k = tile * into.shape[1] + gl.arange(0, into.shape[1], gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(
        into, grad_ptr + t.to(gl.int64)[:, None] * area + k[None, :], mask=on
    )
    async_copy.commit_group()


@gluon.jit
def ask_for(ptr, on):
    """Lines of memory, into the second cache."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [ptr.to(gl.int64), on.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def places(p, n_tokens, padded, stride_i, stride_j, EVEN: gl.constexpr):
    """Which positions p are inside the real square, where their rows of z begin, and which cells they are."""
    if EVEN:
        inside, cell = p >= 0, p.to(gl.int64)
        source = cell * WIDTH
    else:
        inside, i, j = pair_of(p, n_tokens, padded)
        cell = gl.where(inside, i.to(gl.int64) * n_tokens + j, 0)
        source = gl.where(inside, i.to(gl.int64) * stride_i + j.to(gl.int64) * stride_j, 0)
    return inside, source, cell


@gluon.jit
def standardised(z_ptr, stats_ptr, area, p, inside, source, c):
    """(z - mean) · rstd of a tile in fp32, and rstd."""
    rstd = gl.load(stats_ptr + 2 * area + p, mask=inside, other=1.0)
    shift = gl.load(stats_ptr + 3 * area + p, mask=inside, other=0.0)
    z = gl.load(z_ptr + source[:, None] + c[None, :], mask=inside[:, None], other=0.0)
    return z.to(gl.float32) * rstd[:, None] + shift[:, None], rstd


@gluon.jit
def sums_of_lanes(x):
    """A quarter of the rows of x: sums of four each, two of a lane and two of its neighbour."""
    halves = gl.sum(gl.reshape(x, (x.shape[0] // 16, 2, 8, WIDTH)), 1)
    quarters = gl.sum(gl.reshape(halves, (x.shape[0] // 16, 2, 4, WIDTH)), 1)
    return gl.reshape(quarters, (x.shape[0] // 4, WIDTH))


@gluon.jit(repr=profiled_as("triangle_multiplication_input_gradient_hopper"), do_not_specialize=["group"])
def input_gradient_kernel(
    z_ptr, stats_ptr, gamma_ptr, beta_ptr, w_ptr, mask_ptr, grad_ptr, dn_gate_ptr, dz_ptr, n_ptr, norm_partial_ptr,
    more_ptr, n_tokens, padded, stride_i, stride_j, group,
    MASKED: gl.constexpr, EVEN: gl.constexpr, MORE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dz of `group` tiles of 128 positions from the gradients of a and b `[256, P, P]` and rstd · dn of the gate `[P·P, 128]`.

    stats `[5, P, P]` are those of the forward pass, EVEN: N is P and z contiguous. MORE: another gradient of z `[N·N, 128]` is added to dz.
    Also writes mask · n / 2 `[P·P, 128]` for the weight gradients, and the program's share of dγ and dβ.
    """
    gl.assume(n_tokens > 0)
    gl.assume(padded > 0)
    gl.assume(stride_i >= 0)
    gl.assume(stride_j >= 0)
    gl.assume(group > 0)
    wl: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [num_warps, 1], [1, 0])
    gradients_l: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    part_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, STEP, 16])
    whole_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDTH, 16])
    n_l: gl.constexpr = gl.DotOperandLayout(0, part_l, 2)
    d_l: gl.constexpr = gl.DotOperandLayout(0, whole_l, 2)
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    none = gl.full([ROWS, STEP], 0.0, gl.float32, part_l)
    zero = gl.full([ROWS, WIDTH], 0.0, gl.float32, whole_l)
    sl: gl.constexpr = sums_of_lanes(gl.full([ROWS, WIDTH], 0.0, gl.float32, CHANNELS)).type.layout
    area = padded.to(gl.int64) * padded
    linear_s = gl.allocate_shared_memory(gl.bfloat16, [STEPS, STEP, WIDTH], wide)
    gate_s = gl.allocate_shared_memory(gl.bfloat16, [STEPS, STEP, WIDTH], wide)
    # An allocation each: between accesses to one a barrier would be put.
    grad_s = (
        gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide),
        gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide),
        gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide),
        gl.allocate_shared_memory(gl.bfloat16, [STEP, ROWS], wide),
    )
    banks: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    beta_s = gl.allocate_shared_memory(
        gl.float32, [32, WIDTH], banks, gl.full([32, WIDTH], 0.0, gl.float32, sl)
    )
    gamma_s = gl.allocate_shared_memory(
        gl.float32, [32, WIDTH], banks, gl.full([32, WIDTH], 0.0, gl.float32, sl)
    )
    first = gl.program_id(0) * group
    last = gl.minimum(first + group, ((padded * padded) + ROWS - 1) // ROWS)
    for k in gl.static_range(3):
        fetch_gradients(grad_ptr, grad_s[k], first, k, area, gradients_l, first < last)
    place_weights(w_ptr, linear_s, 0, wl)
    place_weights(w_ptr, gate_s, 2 * WIDTH, wl)
    fence_async_shared()
    c = gl.arange(0, WIDTH, gl.SliceLayout(0, CHANNELS))
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line = gl.arange(0, 256, flat)  # of 128 bytes: a tile of rows
    for tile in range(first, last):
        start = tile * ROWS
        if EVEN:
            ahead = (start + ROWS).to(gl.int64) * WIDTH + line * 64
            ask_for(z_ptr + ahead, (line >= 0) & (tile + 1 < last))
            ask_for(dn_gate_ptr + ahead, (line >= 0) & (tile + 1 < last))
        p = start + gl.arange(0, ROWS, gl.SliceLayout(1, CHANNELS))
        inside, source, cell = places(p, n_tokens, padded, stride_i, stride_j, EVEN)
        keep = inside
        if MASKED:
            keep = inside & gl.load(mask_ptr + cell, mask=inside, other=0).to(gl.int1)
        normal, _ = standardised(z_ptr, stats_ptr, area, p, inside, source, c)
        half_gamma, half_beta = (
            0.5 * gl.load(gamma_ptr + c).to(gl.float32),
            0.5 * gl.load(beta_ptr + c).to(gl.float32),
        )
        n = normal * half_gamma[None, :] + half_beta[None, :]
        n = gl.where(keep[:, None], n, 0.0).to(gl.bfloat16)
        square = p.to(gl.int64)[:, None] * WIDTH + c[None, :]
        gl.store(n_ptr + square, n)
        n = gl.convert_layout(turned_about(n), n_l)
        dn = zero
        for k in gl.static_range(4):
            async_copy.wait_group(2)
            barrier()
            # Into the place of the step before, which every warp has read.
            of_tile = tile + (k + 3) // 4
            fetch_gradients(
                grad_ptr, grad_s[(k + 3) % 4], of_tile, (k + 3) % 4, area, gradients_l, of_tile < last
            )
            linear = warpgroup_mma(n, linear_s.index(k).permute((1, 0)), none, use_acc=False, is_async=True)
            gate = warpgroup_mma(n, gate_s.index(k).permute((1, 0)), none, use_acc=False, is_async=True)
            grad = grad_s[k].permute((1, 0)).load(part_l)
            if k == 0:
                linear, gate = warpgroup_mma_wait(0, deps=[linear, gate])
            else:  # the products of the step before, which read its gradients from registers, have ended too
                of_before = [linear, gate, dn, d_linear, d_gate]  # noqa: F821
                linear, gate, dn, d_linear, d_gate = warpgroup_mma_wait(0, deps=of_before)
            grad = grad.to(gl.float32)
            t = fast_tanh(gate)
            # Both doubled, as are dn and its sums until the end: see `project.gated_gradients`.
            d_linear = grad * t + grad
            d_gate = d_linear * (linear - linear * t)
            d_linear = gl.convert_layout(d_linear.to(gl.bfloat16), d_l)
            d_gate = gl.convert_layout(d_gate.to(gl.bfloat16), d_l)
            dn = warpgroup_mma(d_linear, linear_s.index(k), dn, use_acc=k > 0, is_async=True)
            dn = warpgroup_mma(d_gate, gate_s.index(k), dn, is_async=True)
        # z is read again (from L2): keeping the tile would cost its registers through the loop.
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
        dz = (dn - mean[:, None] - normal * slope[:, None]) * (0.5 * rstd)[:, None]
        cells = cell[:, None] * WIDTH + c[None, :]
        if MORE:
            dz += gl.load(more_ptr + cells, mask=inside[:, None], other=0.0).to(gl.float32)
        gl.store(dz_ptr + cells, dz.to(gl.bfloat16), mask=inside[:, None])
    async_copy.wait_group(0)
    barrier()
    columns: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, num_warps], [1, 0])
    share = norm_partial_ptr + gl.program_id(0).to(gl.int64) * (2 * WIDTH)
    t = gl.arange(0, WIDTH, gl.SliceLayout(0, columns))
    gl.store(share + t, gl.sum(gamma_s.load(columns), 0) * 0.5)
    gl.store(share + WIDTH + t, gl.sum(beta_s.load(columns), 0) * 0.5)
