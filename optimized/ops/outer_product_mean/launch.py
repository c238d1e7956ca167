"""Outer products by the library a block of rows at a time, projected by the kernels: grids and workspaces."""

from collections.abc import Iterator

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, processors, product_width, tile
from optimized.ops.outer_product_mean import kernels
from optimized.ops.tuning import Config

BLOCK_BYTES = 32 * 2**20
"""Outer products held at once: few enough to stay in the last-level cache between product and projection."""
GRADIENT_BYTES = 128 * 2**20
"""Their gradients held at once: enough output per product (S rows by c channels of a block) to fill the GPU."""

HALF = {
    "project": tile(128, 64, 8, 3),
    "expand": tile(128, 64, 8, 2),
    "weight": tile(64, 64, 4, 3),
}
FULL = {
    "project": tile(32, 16, 4, 1),
    "expand": tile(32, 16, 4, 1),
    "weight": tile(16, 16, 4, 1),
}


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `outer_product_mean.<kernel>` where no tuning file has one; `channels` of the pair."""
    if dtype != torch.float32 and channels <= 128:
        return HALF[kernel.partition(".")[2]]
    return FULL[kernel.partition(".")[2]]


def _config(kernel: str, weight: Tensor) -> Config:
    return chosen(f"outer_product_mean.{kernel}", weight.shape[0], weight.dtype, weight.device, default)


def _sizes(a: Tensor, b: Tensor, weight: Tensor) -> dict[str, int]:
    channels = weight.shape[0]
    padded = product_width(channels)
    return {"C": a.shape[2], "D": b.shape[2], "Z": channels, "BZ": padded}


def blocks(length: int, bytes_each: int, limit: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the blocks of `length` tokens, of at most `limit` bytes, in fours where possible."""
    step = max(1, limit // bytes_each)
    step = min(length, step - step % 4 if step >= 4 else step)
    for first in range(0, length, step):
        yield first, min(step, length - first)


def _flat(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1)


def _outer(a: Tensor, b: Tensor, first: int, count: int, space: Tensor) -> Tensor:
    """O `[(count, c), (J, d)]` of rows `first` … in the workspace."""
    width = a.shape[2]
    out = space[: count * width * b.shape[1] * b.shape[2]].view(count * width, -1)
    return torch.mm(_flat(a)[:, first * width : (first + count) * width].t(), _flat(b), out=out)


def _space(a: Tensor, b: Tensor, limit: int, length: int, other: int) -> tuple[Tensor, int]:
    """A workspace for blocks of the `length` tokens of one side, and the bytes of one of its tokens."""
    each = a.shape[2] * b.shape[2] * other
    _, count = next(blocks(length, each * a.element_size(), limit))
    return torch.empty(count * each, dtype=a.dtype, device=a.device), each * a.element_size()


def forward(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """out `[I, J, z]` in a's dtype from contiguous a `[S, I, c]` and b `[S, J, d]`."""
    weight = weight.to(a.dtype).contiguous()
    rows, total = a.shape[1], b.shape[1]
    config, sizes = _config("project", weight), _sizes(a, b, weight)
    out = torch.empty((rows, total, weight.shape[0]), dtype=a.dtype, device=a.device)
    space, each = _space(a, b, BLOCK_BYTES, rows, total)
    for first, count in blocks(rows, each, BLOCK_BYTES):
        o = _outer(a, b, first, count, space)
        grid = (count, ceil_div(total, config.constants["BM"]), 1)
        launch(kernels.project_kernel, grid, config, (o, weight, bias, scale, out, first, total), **sizes)
    return out


def backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, db, and the gradients of weight and bias in fp32; the outer products are computed again."""
    weight = weight.to(a.dtype).contiguous()
    d_weight, d_bias = weight_gradients(dout, a, b, weight, scale)
    da, db = factor_gradients(dout, a, b, weight, scale)
    return da, db, d_weight, d_bias


def weight_gradients(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: Tensor, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of weight `[z, c·d]` and bias `[z]` in fp32, summed in a fixed order."""
    config = config or _config("weight", weight)
    rows, total = a.shape[1], b.shape[1]
    sizes = _sizes(a, b, weight)
    chunks = ceil_div(weight.shape[1], config.constants["BN"])
    splits = max(1, 2 * processors(a.device) // chunks)
    shares = torch.empty((splits, *weight.shape), dtype=torch.float32, device=a.device)
    bias_shares = torch.empty((splits, weight.shape[0]), dtype=torch.float32, device=a.device)
    space, each = _space(a, b, BLOCK_BYTES, rows, total)
    for first, count in blocks(rows, each, BLOCK_BYTES):
        o = _outer(a, b, first, count, space)
        arguments = (dout, scale, o, shares, bias_shares, first, count, total, splits)
        launch(kernels.weight_kernel, (chunks, splits, 1), config, arguments, FRESH=first == 0, **sizes)
    return shares.sum(0), bias_shares.sum(0)


def factor_gradients(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """da and db: every entry is one product over all tokens of the other side, so nothing is summed over blocks."""
    rows, total = a.shape[1], b.shape[1]
    da, db = torch.empty_like(a), torch.empty_like(b)
    space, each = _space(a, b, GRADIENT_BYTES, rows, total)
    whole = None
    for first, count in blocks(rows, each, GRADIENT_BYTES):
        do = _expand(dout, scale, weight, a, b, (first, count), (0, total), space)
        torch.mm(_flat(b), do.t(), out=_flat(da)[:, first * a.shape[2] : (first + count) * a.shape[2]])
        whole = do if count == rows else None
    if whole is not None:
        torch.mm(_flat(a), whole, out=_flat(db))
        return da, db
    space, each = _space(a, b, GRADIENT_BYTES, total, rows)
    for first, count in blocks(total, each, GRADIENT_BYTES):
        do = _expand(dout, scale, weight, a, b, (0, rows), (first, count), space)
        torch.mm(_flat(a), do, out=_flat(db)[:, first * b.shape[2] : (first + count) * b.shape[2]])
    return da, db


def _expand(
    dout: Tensor,
    scale: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    space: Tensor,
) -> Tensor:
    """dO `[(rows, c), (columns, d)]` of a block, given as (first, count) of each side, in the workspace."""
    config = _config("expand", weight)
    do = space[: rows[1] * a.shape[2] * columns[1] * b.shape[2]].view(rows[1] * a.shape[2], -1)
    grid = (rows[1], ceil_div(columns[1], config.constants["BM"]), 1)
    arguments = (dout, scale, weight, do, rows[0], columns[0], columns[1], b.shape[1])
    launch(kernels.expand_kernel, grid, config, arguments, **_sizes(a, b, weight))
    return do
