"""Launches of the LayerNorm + Linear kernels: tile shapes, grids and workspaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, grouped, processors, product_width, tile
from optimized.ops.layer_norm_linear import kernels
from optimized.ops.parameters import fold, gradient_dtype
from optimized.ops.tuning import Config

HALF = {
    "forward": tile(64, 64, 4, 2),
    "input_gradient": tile(64, 64, 4, 3),
    "weight_gradient": tile(64, 64, 4, 4),
    "bias_gradient": tile(32, 64, 4, 1),
}
"""`bias_gradient` is the input gradient of a head weight alone: it waits for memory, and larger tiles spill."""
HALF_WIDE = dict.fromkeys(HALF, tile(32, 32, 8, 1))
FULL = dict.fromkeys(HALF, tile(32, 16, 8, 1)) | {"bias_gradient": tile(16, 16, 8, 1)}


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `layer_norm_linear.<kernel>` where no tuning file has one."""
    table = FULL if dtype == torch.float32 else HALF if channels <= 128 else HALF_WIDE
    return table[kernel.partition(".")[2]]


def _config(kernel: str, x: Tensor, dtype: torch.dtype) -> Config:
    return chosen(f"layer_norm_linear.{kernel}", x.shape[1], dtype, x.device, default)


@cache
def _narrow(shape: tuple[int, ...]) -> Config:
    return tile(*shape)


def narrowed(config: Config, width: int) -> Config:
    """The same tile with at most `width` output channels (always the same object for the same tile)."""
    constants = config.constants
    shape = (constants["BM"], width, config.num_warps, constants["STAGES"], config.max_registers)
    return _narrow(shape)


def _four(tensors: list[Tensor], spare: Tensor) -> list[Tensor]:
    """Four pointers for the kernels; the unused ones point to `spare`."""
    return tensors + [spare] * (4 - len(tensors))


@dataclass(frozen=True)
class Widths:
    """Sizes of the maps of one call: T ≤ 4 weights `[h, c]` and a head weight `[heads, c]`; any may be absent."""

    hidden: int
    heads: int
    count: int

    @staticmethod
    def of(weights: Sequence[Tensor], head: Tensor | None) -> "Widths":
        """The sizes of these weights."""
        hidden = weights[0].shape[0] if weights else 0
        return Widths(hidden, head.shape[0] if head is not None else 0, len(weights))

    def blocks(self, channels: int) -> dict[str, int]:
        """Compile-time sizes of the kernels."""
        return {
            "C": channels,
            "H": self.hidden,
            "HEADS": self.heads,
            "T": self.count,
            "BC": product_width(channels),
            "BS": product_width(self.heads),
        }


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    widths: Widths,
    eps: float,
    config: Config | None = None,
) -> list[Tensor]:
    """The results `[rows, h]` of every weight, then `[heads, rows]` when there is a head weight.

    `w` holds the weights and the head weight one after another, in the dtype of the results.
    """
    rows, channels = x.shape
    config = config or _config("forward", x, w.dtype)
    outs = [torch.empty((rows, widths.hidden), dtype=w.dtype, device=x.device) for _ in range(widths.count)]
    narrow = [torch.empty((widths.heads, rows), dtype=w.dtype, device=x.device)] if widths.heads else []
    arguments = (x, *norm, w, *_four(outs, w), *(narrow or [w]), rows, eps)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    launch(kernels.forward_kernel, grid, config, arguments, **widths.blocks(channels))
    return outs + narrow


def input_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    widths: Widths,
    grads: list[Tensor],
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n = LN(x) in the weights' dtype, and partial sums of dγ and dβ `[programs, 2c]`."""
    rows, channels = x.shape
    config = config or _config("input_gradient" if widths.count else "bias_gradient", x, w.dtype)
    programs, group = grouped(ceil_div(rows, config.constants["BM"]))
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=w.dtype, device=x.device)
    shares = torch.empty((programs, 2 * channels), dtype=torch.float32, device=x.device)
    pointers = (*_four(grads[: widths.count], w), grads[-1], dx, n, shares)
    arguments = (x, *norm, w, *pointers, rows, group, eps)
    launch(kernels.input_gradient_kernel, (programs, 1, 1), config, arguments, **widths.blocks(channels))
    return dx, n, shares


def weight_gradient(n: Tensor, grads: list[Tensor], config: Config | None = None) -> Tensor:
    """Partial weight gradients `[splits, T·h·c]` in fp32 of T maps from their gradients `[rows, h]` (equal strides)."""
    rows, channels = n.shape
    hidden = grads[0].shape[1]
    config = config or _config("weight_gradient", n, n.dtype)
    if config.constants["BN"] > product_width(hidden):
        config = narrowed(config, product_width(hidden))
    programs = len(grads) * ceil_div(hidden, config.constants["BN"])
    steps = ceil_div(rows, config.constants["BM"])
    splits = max(1, min(2 * processors(n.device) // programs, steps))
    partial = torch.empty((splits, len(grads) * hidden * channels), dtype=torch.float32, device=n.device)
    arguments = (n, *_four(grads, n), partial, rows, splits, grads[0].stride(0), grads[0].stride(1))
    blocks = {"C": channels, "H": hidden, "T": len(grads), "BC": product_width(channels)}
    launch(kernels.weight_gradient_kernel, (programs, splits, 1), config, arguments, **blocks)
    return partial


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    head: Tensor | None,
    w: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, the weights and the head weight one after another in one vector; `w` as forward."""
    widths = Widths.of(weights, head)
    matrices = [*weights, head] if head is not None else weights
    dx, n, shares = input_gradient(x, norm, w, widths, grads, eps)
    partials = [weight_gradient(n, grads[: widths.count])] if weights else []
    if head is not None:
        partials.append(weight_gradient(n, [grads[-1].t()]))
    return dx, fold([shares], partials, gradient_dtype((*norm, *matrices)))
