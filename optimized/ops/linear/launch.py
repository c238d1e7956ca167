"""Launches of the product kernel: tiles, and how many programs share a long sum."""

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, processors
from optimized.ops.linear import kernels
from optimized.ops.tuning import Config

TILES = {
    "forward": Config({"BM": 128, "BN": 128, "BK": 32, "STAGES": 3}, 8),
    "input_gradient": Config({"BM": 128, "BN": 128, "BK": 32, "STAGES": 3}, 8),
    "weight_gradient": Config({"BM": 128, "BN": 64, "BK": 32, "STAGES": 3}, 8),
}


ANY = 0
"""In place of channels in the key of a tile: one serves all."""


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile of `linear.<kernel>` where no tuning file has one."""
    return TILES[kernel.partition(".")[2]]


def product(x: Tensor, w: Tensor, bias: Tensor | None, config: Config, splits: int = 1) -> Tensor:
    """x·wᵀ + bias in fp32 from x `[m, k]` and w `[n, k]` of any strides; with `splits`, as so many shares `[·, m, n]`."""
    (rows, terms), columns = x.shape, w.shape[0]
    tile = config.constants
    steps = ceil_div(ceil_div(terms, tile["BK"]), splits)
    splits = ceil_div(terms, steps * tile["BK"])
    y = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    grid = (ceil_div(rows, tile["BM"]) * ceil_div(columns, tile["BN"]), splits, 1)
    arguments = (x, w, y if bias is None else bias, y, rows, columns, terms, steps, *x.stride(), *w.stride())
    whole = {"EVEN": terms % tile["BK"], "WHOLE_M": rows % tile["BM"], "WHOLE_N": columns % tile["BN"]}
    sizes = {name: rest == 0 for name, rest in whole.items()}
    launch(kernels.product_kernel, grid, config, arguments, BIAS=bias is not None, **sizes)
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[rows, h]` from x `[rows, c]`, weight `[h, c]` and bias `[h]`."""
    config = chosen("linear.forward", ANY, x.dtype, x.device, default)
    return product(x, weight, bias, config)[0]


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """`[rows, c]` from dy `[rows, h]`."""
    config = chosen("linear.input_gradient", ANY, dy.dtype, dy.device, default)
    return product(dy, weight.t(), None, config)[0]


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """`[h, c]`: a sum over all rows, in shares that fill the device and are added in their order."""
    config = chosen("linear.weight_gradient", ANY, x.dtype, x.device, default)
    programs = ceil_div(dy.shape[1], config.constants["BM"]) * ceil_div(x.shape[1], config.constants["BN"])
    splits = max(1, min(2 * processors(x.device) // programs, x.shape[0] // (8 * config.constants["BK"])))
    shares = product(dy.t(), x.t(), None, config, splits)
    return shares[0] if shares.shape[0] == 1 else shares.sum(0)
