"""Launches of the transition kernels: tile shapes, grids and workspaces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import (
    ceil_div,
    chosen,
    fast_sigmoid,
    one_each,
    processors,
    product_width,
    runs_gluon,
    spread,
    tile,
)
from optimized.ops.parameters import fold, gradient_dtype, pack
from optimized.ops.transition import kernels
from optimized.ops.tuning import Config


def form(name: str, rows: int, width: int, warps: int, stages: int) -> Config:
    """A tile for another form of its kernel: JOINT or TURNED."""
    config = tile(rows, width, warps, stages)
    return Config(config.constants | {name: 1}, warps)


HALF = {
    "forward": tile(64, 64, 4, 2),
    "input_gradient": form("JOINT", 64, 32, 4, 3),
    "weight_gradient": form("TURNED", 32, 64, 4, 3),
}
# Weight gradients have c rows: more than four warps would share 64 of them.
HALF_NARROW = HALF | {"input_gradient": tile(64, 32, 4, 2), "weight_gradient": tile(64, 32, 4, 2)}
HALF_WIDE = {
    "forward": tile(32, 32, 8, 1),
    "input_gradient": tile(16, 32, 8, 1),
    "weight_gradient": tile(16, 16, 8, 1),
}


# Of the kernels in `hopper` and `hopper_gradient`, which add five warps: steps of weights that are on their way or in use.
HOPPER, ARRANGE = Config({"STAGES": 4}, 4), Config({}, 4)
HOPPER_ROWS, HOPPER_UNITS = 128, 32
"""Of two tiles, and hidden units of a step, which go round the stages an even number of times."""


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `transition.<kernel>` where no tuning file has one."""
    name = kernel.partition(".")[2]
    return (HALF_NARROW if channels <= 64 else HALF if channels <= 128 else HALF_WIDE)[name]


def _config(kernel: str, x: Tensor, dtype: torch.dtype) -> Config:
    return chosen(f"transition.{kernel}", x.shape[1], dtype, x.device, default)


def _form(name: str, config: Config) -> dict[str, bool]:
    """The constant that chooses the form of a kernel, where the configuration does not: the plain one."""
    return {} if name in config.constants else {name: False}


def _sizes(w: Tensor, channels: int, device: torch.device) -> dict[str, int]:
    """Compile-time sizes of the kernels, for packed weights w_a, w_b, w_out of `dtype`."""
    hidden = w.numel() // (3 * channels)
    block = product_width(channels)
    return {"C": channels, "H": hidden, "BC": block, "FAST": fast_sigmoid(w.dtype, device)}


def run_forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> Tensor:
    """`forward` from w_a, w_b, w_out, by the kernel for this device."""
    hidden = weights[0].shape[0]
    if not _rings(x, hidden, dtype):
        return forward(x, norm, pack(weights, dtype), eps, added=added)
    from optimized.ops.transition import hopper

    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, dtype) if added else dtype, device=x.device)
    chunks, turns, programs, group = _rounds(x, hidden)
    arguments = (x, *norm, _arranged(weights, dtype), out, x.shape[0], group, turns, eps)
    sizes = {"CHUNKS": chunks, "ADDED": added}
    launch(hopper.forward_kernel, (programs, 1, 1), HOPPER, arguments, **sizes)
    return out


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    eps: float,
    config: Config | None = None,
    added: bool = False,
) -> Tensor:
    """y `[rows, c]` in the weights' dtype from x `[rows, c]`; `w` is w_a, w_b, w_out one after another.

    `added`: x + y, in the wider dtype of both.
    """
    rows, channels = x.shape
    dtype = torch.promote_types(x.dtype, w.dtype) if added else w.dtype
    out = torch.empty((rows, channels), dtype=dtype, device=x.device)
    config = config or _config("forward", x, w.dtype)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    sizes = _sizes(w, channels, x.device)
    sizes |= _form("JOINT", config) | {"ADDED": added}
    launch(kernels.forward_kernel, grid, config, (x, *norm, w, out, rows, eps), **sizes)
    return out


def _rings(x: Tensor, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are those whose weights are in the ring of `hopper_ring`."""
    round_trip = 2 * HOPPER.constants["STAGES"] * HOPPER_UNITS
    fits = x.shape[1] == 128 and hidden % round_trip == 0
    dtypes = dtype == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32)
    return fits and dtypes and runs_gluon(x.device)


def _rounds(x: Tensor, hidden: int) -> tuple[int, int, int, int]:
    """Of those kernels: steps, how often these go round the stages, programs, and pairs of tiles of each."""
    chunks = hidden // HOPPER_UNITS
    turns = chunks // HOPPER.constants["STAGES"]
    return chunks, turns, *one_each(ceil_div(x.shape[0], HOPPER_ROWS), x.device)


def _arranged(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """w_a, w_b, w_out as a ring takes them, in `dtype`."""
    from optimized.ops.transition import hopper_ring

    hidden = weights[0].shape[0]
    arranged = torch.empty(3 * weights[0].numel(), dtype=dtype, device=weights[0].device)
    arguments = (*(w.contiguous() for w in weights), arranged)
    launch(hopper_ring.arrange_kernel, (hidden // HOPPER_UNITS, 1, 1), ARRANGE, arguments, H=hidden)
    return arranged


def input_gradient(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    w: Tensor,
    dy: Tensor,
    eps: float,
    config: Config | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, n / 2 = LN(x) / 2 in the weights' dtype, and the partial sums of dγ and dβ `[programs, 2c]`.

    `more`: another gradient of x, which is added to dx.
    """
    rows, channels = x.shape
    config = config or _config("input_gradient", x, w.dtype)
    programs, group = spread(ceil_div(rows, config.constants["BM"]), config, channels, w)
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=w.dtype, device=x.device)
    shares = torch.empty((programs, 2 * channels), dtype=torch.float32, device=x.device)
    arguments = (x, *norm, w, dy, dx, n, shares, x if more is None else more, rows, group, eps)
    sizes = _sizes(w, channels, x.device) | _form("JOINT", config) | {"MORE": more is not None}
    launch(kernels.input_gradient_kernel, (programs, 1, 1), config, arguments, **sizes)
    return dx, n, shares


def _input_gradient_hopper(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    dy: Tensor,
    eps: float,
    more: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `input_gradient`, from w_a, w_b, w_out."""
    from optimized.ops.transition import hopper_gradient

    rows, channels = x.shape
    chunks, turns, programs, group = _rounds(x, weights[0].shape[0])
    dx, n = torch.empty_like(x), torch.empty((rows, channels), dtype=dy.dtype, device=x.device)
    shares = torch.empty((2 * programs, 2 * channels), dtype=torch.float32, device=x.device)
    outs = (dx, n, shares, x if more is None else more)
    arguments = (x, *norm, _arranged(weights, dy.dtype), dy, *outs, rows, group, turns, eps)
    sizes = {"CHUNKS": chunks, "MORE": more is not None}
    launch(hopper_gradient.input_gradient_kernel, (programs, 1, 1), HOPPER, arguments, **sizes)
    return dx, n, shares


def weight_gradient(n: Tensor, w: Tensor, dy: Tensor, config: Config | None = None) -> Tensor:
    """Partial weight gradients `[splits, 3·c·h]` in fp32 from n / 2: dw_a, dw_b, dw_out one after another."""
    rows, channels = n.shape
    sizes = _sizes(w, channels, n.device)
    config = config or _config("weight_gradient", n, n.dtype)
    chunks = ceil_div(sizes["H"], config.constants["BN"])
    # Sums in registers leave room for eight warps on a multiprocessor in the turned form, whatever their tiles.
    programs = processors(n.device) * (max(1, 8 // config.num_warps) if "TURNED" in config.constants else 1)
    splits = max(1, min(programs // chunks, ceil_div(rows, config.constants["BM"])))
    partial = torch.empty((splits, w.numel()), dtype=torch.float32, device=n.device)
    arguments = (n, dy, w, partial, rows, splits)
    sizes |= _form("TURNED", config)
    launch(kernels.weight_gradient_kernel, (chunks, splits, 1), config, arguments, **sizes)
    return partial


def backward(
    dy: Tensor,
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, w_a, w_b, w_out one after another in one vector; products in `dtype`.

    `added`: dy is the gradient of x + y.
    """
    w, narrow, more = pack(weights, dtype), dy.to(dtype), dy if added else None
    if _rings(x, weights[0].shape[0], dtype):
        dx, n, shares = _input_gradient_hopper(x, norm, weights, narrow, eps, more)
    else:
        dx, n, shares = input_gradient(x, norm, w, narrow, eps, more=more)
    return dx, fold([shares], [weight_gradient(n, w, narrow)], gradient_dtype((*norm, *weights)))
