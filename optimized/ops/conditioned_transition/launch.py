"""The conditioned transition as kernels and library products, forward and backward."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.adaptive_layer_norm import launch as adaptive
from optimized.ops.conditioned_transition import kernels
from optimized.ops.conditioned_transition.reference import ConditionedWeights
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, power_of_two
from optimized.ops.library_products import side_by_side, side_by_side_backward, weight_product
from optimized.ops.tuning import Config

BLOCK = 1024
"""Elements per program of the elementwise kernels: with four warps, 8 values a thread, a 16-byte load in bf16."""


class Saved(NamedTuple):
    """What the backward pass needs besides the inputs, in the compute dtype."""

    y: Tensor
    """`[rows, c_a]`, the result."""
    p: Tensor
    """`[period, 2·c_a]`, gate and shift of the adaptive LayerNorm."""
    u: Tensor
    """`[rows, 2·h]`, the two hidden projections."""
    g: Tensor
    """`[period, c_a]`, the output gate before its bias and sigmoid."""


def tile(width: int, elements: int = BLOCK) -> Config:
    """BM rows and BN columns per program of an elementwise kernel on rows of `width`."""
    columns = min(256, power_of_two(width))
    return Config({"BM": max(1, elements // columns), "BN": columns}, 4)


def grid(rows: int, width: int, config: Config) -> tuple[int, int, int]:
    """Programs for `rows` rows of `width`."""
    return ceil_div(rows, config.constants["BM"]), ceil_div(width, config.constants["BN"]), 1


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile of `conditioned_transition.<kernel>` where no tuning file has one."""
    return tile(channels, 2 * BLOCK if kernel.endswith(".gate_backward") else BLOCK)


def _config(kernel: str, width: int, x: Tensor) -> Config:
    return chosen(f"conditioned_transition.{kernel}", width, x.dtype, x.device, default)


def swiglu(u: Tensor) -> Tensor:
    """swish of the first half of the columns times the second half."""
    rows, hidden = u.shape[0], u.shape[1] // 2
    h, config = u.new_empty((rows, hidden)), _config("swiglu", hidden, u)
    launch(kernels.swiglu_kernel, grid(rows, hidden, config), config, (u, h, rows), H=hidden)
    return h


def swiglu_backward(u: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of u, and h again."""
    rows, hidden = dh.shape
    du, h, config = torch.empty_like(u), torch.empty_like(dh), _config("swiglu_backward", hidden, u)
    arguments = (u, dh, du, h, rows)
    launch(kernels.swiglu_backward_kernel, grid(rows, hidden, config), config, arguments, H=hidden)
    return du, h


def gate(o: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """σ(g + bias) ⊙ o `[rows, c]`; g `[period, c]` of o's dtype."""
    rows, channels = o.shape
    y, config = torch.empty_like(o), _config("gate", channels, o)
    arguments = (o, g, bias, y, rows, g.shape[0])
    launch(kernels.gate_kernel, grid(rows, channels, config), config, arguments, C=channels)
    return y


def gate_backward(y: Tensor, g: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """do, dg, and the gradient of the bias in fp32."""
    period, channels = g.shape
    do, dg, config = torch.empty_like(y), torch.empty_like(g), _config("gate_backward", channels, y)
    size = grid(period, channels, config)
    shares = torch.empty((size[0], channels), dtype=torch.float32, device=y.device)
    arguments = (y, g, bias, dy, do, dg, shares, period, y.shape[0] // period)
    launch(kernels.gate_backward_kernel, size, config, arguments, C=channels)
    return do, dg, shares.sum(0)


def forward(a: Tensor, s: Tensor, w: ConditionedWeights, eps: float, dtype: torch.dtype) -> Saved:
    """The result and what the backward pass needs, from a `[rows, c_a]` and s `[period, c_s]`."""
    p = adaptive.conditions(s, w.norm_weight, [w.scale, w.shift], eps, dtype)
    u = side_by_side(adaptive.modulate(a, p, w.scale_bias, eps), [w.a, w.b])
    o = side_by_side(swiglu(u), [w.out])
    g = side_by_side(s.to(dtype), [w.gate])
    return Saved(gate(o, g, w.gate_bias), p, u, g)


def backward(
    dy: Tensor, a: Tensor, s: Tensor, w: ConditionedWeights, saved: Saved, eps: float
) -> tuple[Tensor, ...]:
    """da, ds, then in fp32 the gradients of norm_weight, (scale, shift), scale_bias, (a, b), out, gate, gate_bias.

    Pairs in brackets are stacked along the first axis.
    """
    dtype = saved.y.dtype
    do, dg, d_gate_bias = gate_backward(saved.y, saved.g, w.gate_bias, dy)
    du, h = swiglu_backward(saved.u, side_by_side_backward(do, [w.out]))
    d_out = weight_product(do, h)
    dx = side_by_side_backward(du, [w.a, w.b])
    da, dp, d_scale_bias, x = adaptive.modulate_backward(a, saved.p, w.scale_bias, dx, eps, recompute=True)
    d_ab = weight_product(du, x)
    d_gate = weight_product(dg, s.to(dtype))
    ds, d_norm, d_conditions = adaptive.conditions_backward(
        dp, s, w.norm_weight, [w.scale, w.shift], side_by_side_backward(dg, [w.gate]), eps
    )
    return da, ds, d_norm, d_conditions, d_scale_bias, d_ab, d_out, d_gate, d_gate_bias
