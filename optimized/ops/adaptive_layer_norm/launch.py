"""Launches of the adaptive LayerNorm kernels and the matrix products between them."""

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm import kernels
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, power_of_two
from optimized.ops.library_products import side_by_side, side_by_side_backward, weight_product
from optimized.ops.tuning import Config

TILE = 4096
"""Elements a program holds: 32 fp32 values per thread of 4 warps and tile."""


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """Rows per program of `adaptive_layer_norm.<kernel>` where no tuning file has them."""
    elements = TILE // 2 if kernel.endswith("modulate_backward") else TILE
    return Config({"BM": max(1, elements // power_of_two(channels))}, 4)


def _config(kernel: str, channels: int, dtype: torch.dtype, device: torch.device) -> Config:
    return chosen(f"adaptive_layer_norm.{kernel}", channels, dtype, device, default)


def _sizes(channels: int) -> dict[str, int]:
    return {"C": channels, "BC": power_of_two(channels)}


def norm(s: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """weight ⊙ LN(s) in `dtype` of s `[rows, c]`."""
    rows, channels = s.shape
    config = _config("norm", channels, dtype, s.device)
    n = torch.empty(s.shape, dtype=dtype, device=s.device)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    launch(kernels.norm_kernel, grid, config, (s, weight, n, rows, eps), **_sizes(channels))
    return n


def norm_backward(
    s: Tensor, weight: Tensor, dn: Tensor, extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds (plus `extra`), n = weight ⊙ LN(s) in dn's dtype, and the gradient of weight in fp32."""
    rows, channels = s.shape
    config = _config("norm_backward", channels, dn.dtype, s.device)
    programs = ceil_div(rows, config.constants["BM"])
    ds, n = torch.empty_like(s), torch.empty_like(dn)
    shares = torch.empty((programs, channels), dtype=torch.float32, device=s.device)
    arguments = (s, weight, dn, dn if extra is None else extra, ds, n, shares, rows, eps)
    sizes = _sizes(channels) | {"EXTRA": extra is not None}
    launch(kernels.norm_backward_kernel, (programs, 1, 1), config, arguments, **sizes)
    return ds, n, shares.sum(0)


def conditions(
    s: Tensor, norm_weight: Tensor, weights: list[Tensor], eps: float, dtype: torch.dtype
) -> Tensor:
    """g and t side by side, `[period, 2·c_a]`; `weights` are w_scale and w_shift."""
    return side_by_side(norm(s, norm_weight, eps, dtype), weights)


def modulate(a: Tensor, p: Tensor, b_scale: Tensor, eps: float) -> Tensor:
    """y `[rows, c_a]` in p's dtype."""
    rows, channels = a.shape
    config = _config("modulate", channels, p.dtype, a.device)
    y = torch.empty((rows, channels), dtype=p.dtype, device=a.device)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    arguments = (a, p, b_scale, y, rows, p.shape[0], eps)
    launch(kernels.modulate_kernel, grid, config, arguments, **_sizes(channels))
    return y


def modulate_backward(
    a: Tensor, p: Tensor, b_scale: Tensor, dy: Tensor, eps: float, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, dp, the gradient of b_scale in fp32, and y again (an empty tensor without `recompute`)."""
    period, channels = p.shape[0], a.shape[1]
    config = _config("modulate_backward", channels, p.dtype, a.device)
    programs = ceil_div(period, config.constants["BM"])
    da, dp = torch.empty_like(a), torch.empty_like(p)
    y = torch.empty(a.shape if recompute else (0,), dtype=p.dtype, device=a.device)
    shares = torch.empty((programs, channels), dtype=torch.float32, device=a.device)
    arguments = (a, p, b_scale, dy, da, y, dp, shares, period, a.shape[0] // period, eps)
    sizes = _sizes(channels) | {"RECOMPUTE": recompute}
    launch(kernels.modulate_backward_kernel, (programs, 1, 1), config, arguments, **sizes)
    return da, dp, shares.sum(0), y


def conditions_backward(
    dp: Tensor, s: Tensor, norm_weight: Tensor, weights: list[Tensor], extra: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ds (plus `extra`), and in fp32 the gradients of norm_weight and of w_scale and w_shift as `[2·c_a, c_s]`."""
    ds, n, d_norm = norm_backward(s, norm_weight, side_by_side_backward(dp, weights), extra, eps)
    return ds, d_norm, weight_product(dp, n)
