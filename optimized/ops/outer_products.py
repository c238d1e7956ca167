"""Sums of outer products over rows, gᵀ·n: the weight gradients of linear maps, from operands in memory.

Bytes: every operand once (n once per chunk of outputs, mostly from L2). FLOP: 2·rows·outputs·inputs per pair.
The partial sums are fp32 over fixed sets of rows and are folded afterwards in a fixed order: no atomics.
"""

# ruff: noqa: ANN001, ANN201 (Triton compiles the kernels: an annotation would mean a compile-time constant)
# mypy: disable-error-code="no-untyped-def, no-redef, assignment, operator"
import torch
import triton
import triton.language as tl
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, processors, product_width
from optimized.ops.names import profiled_as
from optimized.ops.rows import accumulate
from optimized.ops.tuning import Config


@triton.jit(repr=profiled_as("outer_products"), do_not_specialize=["splits"])
def products_kernel(
    g0_ptr,
    n0_ptr,
    g1_ptr,
    n1_ptr,
    partial_ptr,
    rows,
    splits,
    G: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BN outputs of g0ᵀ·n0 `[G, N0]` or g1ᵀ·n1 `[G, N1]` over every `splits`-th tile of rows."""
    chunks: tl.constexpr = (G + BN - 1) // BN
    split = tl.program_id(1)
    g_ptr = g0_ptr
    n_ptr = n0_ptr
    width = N0
    place = partial_ptr + split.to(tl.int64) * G * (N0 + N1)
    if tl.program_id(0) >= chunks:
        g_ptr = g1_ptr
        n_ptr = n1_ptr
        width = N1
        place += G * N0
    t = (tl.program_id(0) % chunks) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    acc = tl.zeros([BN, BC], tl.float32)
    for start in tl.range(split * BM, rows, splits * BM, num_stages=STAGES):
        m = tl.arange(0, BM).to(tl.int64) + start
        if N0 == BC and N1 == BC and G % BN == 0:
            n = tl.load(n_ptr + m[:, None] * BC + c[None, :], mask=(m < rows)[:, None], other=0.0)
            g = tl.load(g_ptr + m[:, None] * G + t[None, :], mask=(m < rows)[:, None], other=0.0)
        else:
            real = (m < rows)[:, None]
            n = tl.load(n_ptr + m[:, None] * width + c[None, :], mask=real & (c < width)[None, :], other=0.0)
            g = tl.load(g_ptr + m[:, None] * G + t[None, :], mask=real & (t < G)[None, :], other=0.0)
        acc = accumulate(acc, tl.trans(g), n)
    where = place + t[:, None] * width + c[None, :]
    tl.store(where, acc, mask=(t < G)[:, None] & (c < width)[None, :])


def products(pairs: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], config: Config) -> Tensor:
    """Partial sums `[splits, G·(N0 + N1)]` in fp32 of g0ᵀ·n0 and g1ᵀ·n1, for g `[rows, G]` and n `[rows, N]`."""
    (g0, n0), (g1, n1) = pairs
    rows, outputs = g0.shape
    chunks = 2 * ceil_div(outputs, config.constants["BN"])
    steps = ceil_div(rows, config.constants["BM"])
    splits = max(1, min(2 * processors(g0.device) // chunks, steps))
    widths = (n0.shape[1], n1.shape[1])
    partial = torch.empty((splits, outputs * sum(widths)), dtype=torch.float32, device=g0.device)
    block = product_width(max(widths))
    sizes = {"G": outputs, "N0": widths[0], "N1": widths[1], "BC": block}
    arguments = (g0, n0, g1, n1, partial, rows, splits)
    launch(products_kernel, (chunks, splits, 1), config, arguments, **sizes)
    return partial
