"""Launches of the transition kernels: tile shapes, grids and workspaces."""

import torch
import triton
from torch import Tensor

from optimized.ops.launching import chosen, in_dtype, processors, tile
from optimized.ops.transition import kernels
from optimized.ops.tuning import Config

HALF = {
    "forward": tile(64, 64, 4, 2),
    "input_gradient": tile(64, 32, 4, 2),
    "weight_gradient": tile(128, 32, 8, 1),
}
# Weight gradients have c rows: more than four warps would share 64 of them.
HALF_NARROW = HALF | {"weight_gradient": tile(64, 32, 4, 2)}
HALF_WIDE = {
    "forward": tile(32, 32, 8, 1),
    "input_gradient": tile(16, 32, 8, 1),
    "weight_gradient": tile(16, 16, 8, 1),
}
FULL = {
    "forward": tile(32, 32, 8, 1),
    "input_gradient": tile(32, 32, 8, 1),
    "weight_gradient": tile(16, 32, 8, 1),
}
FULL_WIDE = dict.fromkeys(FULL, tile(16, 16, 8, 1))


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `transition.<kernel>` where no tuning file has one."""
    name = kernel.partition(".")[2]
    if dtype == torch.float32:
        return (FULL if channels <= 128 else FULL_WIDE)[name]
    return (HALF_NARROW if channels <= 64 else HALF if channels <= 128 else HALF_WIDE)[name]


def _config(kernel: str, x: Tensor, dtype: torch.dtype) -> Config:
    return chosen(f"transition.{kernel}", x.shape[1], dtype, x.device, default)


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    eps: float,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """y `[rows, c]` in `dtype` from x `[rows, c]`; `weights` are w_a, w_b, w_out in any dtype."""
    rows, channels = x.shape
    config = config or _config("forward", x, dtype)
    copies = in_dtype(weights, dtype)
    out = torch.empty((rows, channels), dtype=dtype, device=x.device)
    kernels.forward_kernel[(triton.cdiv(rows, config.constants["BM"]),)](
        x,
        *norm,
        *copies,
        out,
        rows,
        eps,
        C=channels,
        H=weights[0].shape[0],
        BC=triton.next_power_of_2(channels),
        **config.launch(),
    )
    return out


def input_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    dy: Tensor,
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n = LN(x) in the weights' dtype, and the partial sums of dγ and dβ `[programs, 2c]`."""
    rows, channels = x.shape
    dtype = weights[0].dtype
    config = config or _config("input_gradient", x, dtype)
    programs = triton.cdiv(rows, config.constants["BM"])
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=dtype, device=x.device)
    shares = torch.empty((programs, 2 * channels), dtype=torch.float32, device=x.device)
    kernels.input_gradient_kernel[(programs,)](
        x,
        *norm,
        *weights,
        dy,
        dx,
        n,
        shares,
        rows,
        eps,
        C=channels,
        H=weights[0].shape[0],
        BC=triton.next_power_of_2(channels),
        **config.launch(),
    )
    return dx, n, shares


def weight_gradient(n: Tensor, weights: list[Tensor], dy: Tensor, config: Config | None = None) -> Tensor:
    """Partial weight gradients `[splits, 3·c·h]` in fp32: dw_a, dw_b, dw_out one after another."""
    rows, channels = n.shape
    hidden = weights[0].shape[0]
    config = config or _config("weight_gradient", n, n.dtype)
    chunks = triton.cdiv(hidden, config.constants["BN"])
    splits = max(1, min(processors(n.device) // chunks, triton.cdiv(rows, config.constants["BM"])))
    partial = torch.empty((splits, 3 * channels * hidden), dtype=torch.float32, device=n.device)
    kernels.weight_gradient_kernel[(chunks, splits)](
        n,
        dy,
        *weights,
        partial,
        rows,
        splits,
        C=channels,
        H=hidden,
        BC=triton.next_power_of_2(channels),
        **config.launch(),
    )
    return partial


def backward(
    dy: Tensor, x: Tensor, norm: tuple[Tensor, Tensor], weights: list[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, w_a, w_b, w_out one after another in one fp32 vector."""
    channels = x.shape[1]
    copies = in_dtype(weights, dy.dtype)
    dx, n, shares = input_gradient(x, norm, copies, dy, eps)
    flat = torch.empty(2 * channels + 3 * weights[0].numel(), dtype=torch.float32, device=x.device)
    torch.sum(shares, 0, out=flat[: 2 * channels])
    torch.sum(weight_gradient(n, copies, dy), 0, out=flat[2 * channels :])
    return dx, flat
