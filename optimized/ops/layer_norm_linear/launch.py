"""Launches of the LayerNorm + Linear kernels: tile shapes, grids and workspaces."""

import torch
import triton
from torch import Tensor

from optimized.ops.launching import chosen, packed, processors, tile
from optimized.ops.layer_norm_linear import kernels
from optimized.ops.tuning import Config

HALF = {
    "forward": tile(64, 64, 4, 2),
    "input_gradient": tile(128, 64, 8, 2),
    "weight_gradient": tile(64, 64, 4, 3),
}
HALF_WIDE = dict.fromkeys(HALF, tile(32, 32, 8, 1))
FULL = dict.fromkeys(HALF, tile(32, 16, 8, 1))


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `layer_norm_linear.<kernel>` where no tuning file has one."""
    table = FULL if dtype == torch.float32 else HALF if channels <= 128 else HALF_WIDE
    return table[kernel.partition(".")[2]]


def _config(kernel: str, x: Tensor, dtype: torch.dtype) -> Config:
    return chosen(f"layer_norm_linear.{kernel}", x.shape[1], dtype, x.device, default)


def _four(tensors: list[Tensor]) -> list[Tensor]:
    """Four pointers for the kernels; the unused ones repeat the first."""
    return tensors + tensors[:1] * (4 - len(tensors))


def _blocks(channels: int, hidden: int, heads: int, count: int) -> dict[str, int]:
    return {
        "C": channels,
        "H": hidden,
        "HEADS": heads,
        "T": count,
        "BC": triton.next_power_of_2(channels),
        "BS": max(16, triton.next_power_of_2(max(heads, 1))),
    }


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    head: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    config: Config | None = None,
) -> list[Tensor]:
    """The results `[rows, h]` of every weight, then `[heads, rows]` when there is a head weight."""
    rows, channels = x.shape
    hidden, heads = weights[0].shape[0], (head.shape[0] if head is not None else 0)
    config = config or _config("forward", x, dtype)
    whole = packed(weights, dtype)
    outs = [torch.empty((rows, hidden), dtype=dtype, device=x.device) for _ in weights]
    narrow = torch.empty((heads, rows), dtype=dtype, device=x.device) if heads else outs[0]
    kernels.forward_kernel[(triton.cdiv(rows, config.constants["BM"]),)](
        x,
        *norm,
        whole,
        head.to(dtype) if head is not None else whole,
        *_four(outs),
        narrow,
        rows,
        eps,
        **config.launch(),
        **_blocks(channels, hidden, heads, len(weights)),
    )
    return [*outs, narrow] if heads else outs


def input_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    whole: Tensor,
    head: Tensor | None,
    grads: list[Tensor],
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n = LN(x) in the weights' dtype, and partial sums of dγ and dβ `[programs, 2c]`."""
    rows, channels = x.shape
    heads = head.shape[0] if head is not None else 0
    wide = grads[:-1] if heads else grads
    config = config or _config("input_gradient", x, whole.dtype)
    programs = triton.cdiv(rows, config.constants["BM"])
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=whole.dtype, device=x.device)
    shares = torch.empty((programs, 2 * channels), dtype=torch.float32, device=x.device)
    kernels.input_gradient_kernel[(programs,)](
        x,
        *norm,
        whole,
        head if head is not None else whole,
        *_four(wide),
        grads[-1],
        dx,
        n,
        shares,
        rows,
        eps,
        **config.launch(),
        **_blocks(channels, wide[0].shape[1], heads, len(wide)),
    )
    return dx, n, shares


def weight_gradient(n: Tensor, grads: list[Tensor], config: Config | None = None) -> Tensor:
    """Partial weight gradients `[splits, T·h·c]` in fp32 of T maps from their gradients `[rows, h]` (equal strides)."""
    rows, channels = n.shape
    hidden = grads[0].shape[1]
    config = config or _config("weight_gradient", n, n.dtype)
    launch = config.launch()
    launch["BN"] = min(launch["BN"], max(16, triton.next_power_of_2(hidden)))
    programs = len(grads) * triton.cdiv(hidden, launch["BN"])
    splits = max(1, min(2 * processors(n.device) // programs, triton.cdiv(rows, launch["BM"])))
    partial = torch.empty((splits, len(grads) * hidden * channels), dtype=torch.float32, device=n.device)
    kernels.weight_gradient_kernel[(programs, splits)](
        n,
        *_four(grads),
        partial,
        rows,
        splits,
        grads[0].stride(0),
        grads[0].stride(1),
        C=channels,
        H=hidden,
        T=len(grads),
        BC=triton.next_power_of_2(channels),
        **launch,
    )
    return partial


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: list[Tensor],
    head: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, the weights and the head weight one after another in one fp32 vector."""
    dtype = grads[0].dtype
    narrow = head.to(dtype) if head is not None else None
    sizes = [2 * x.shape[1], len(weights) * weights[0].numel(), head.numel() if head is not None else 0]
    flat = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
    d_norm, d_weights, d_head = flat.split(sizes)
    dx, n, shares = input_gradient(x, norm, packed(weights, dtype), narrow, grads, eps)
    torch.sum(shares, 0, out=d_norm)
    torch.sum(weight_gradient(n, grads[: len(weights)]), 0, out=d_weights)
    if head is not None:
        torch.sum(weight_gradient(n, [grads[-1].t()]), 0, out=d_head)
    return dx, flat
