"""Launches of the transition kernels: tile shapes, grids and workspaces."""

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


# Of the kernel in `hopper`: rows, and hidden units at a time.
FORWARD_HOPPER = Config({"BM": 64, "BN": 64}, 4)
# Of that in `hopper_gradient`, which adds five warps: steps of weights that are on their way or in use.
GRADIENT_HOPPER, ARRANGE = Config({"STAGES": 4}, 4), Config({}, 4)
GRADIENT_ROWS, GRADIENT_UNITS = 128, 32
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
    if config is None and _overlaps(x, w):
        return _forward_hopper(x, norm, w, out, eps, added)
    config = config or _config("forward", x, w.dtype)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    sizes = _sizes(w, channels, x.device)
    sizes |= _form("JOINT", config) | {"ADDED": added}
    launch(kernels.forward_kernel, grid, config, (x, *norm, w, out, rows, eps), **sizes)
    return out


def _overlaps(x: Tensor, w: Tensor) -> bool:
    """Whether the forward kernel is that of `hopper`: from a whole tile of rows on, which copies of 16 bytes can fetch."""
    rows, channels = x.shape
    tile, chunk = FORWARD_HOPPER.constants["BM"], FORWARD_HOPPER.constants["BN"]
    hidden = w.numel() // (3 * channels)
    fits = rows >= tile and channels == 128 and hidden % chunk == 0 and hidden > chunk
    return fits and w.dtype == torch.bfloat16 and x.data_ptr() % 16 == 0 and runs_gluon(x.device)


def _forward_hopper(
    x: Tensor, norm: tuple[Tensor, Tensor], w: Tensor, out: Tensor, eps: float, added: bool
) -> Tensor:
    from optimized.ops.transition import hopper

    rows, channels = x.shape
    grid = (ceil_div(rows, FORWARD_HOPPER.constants["BM"]), 1, 1)
    sizes = {"C": channels, "H": w.numel() // (3 * channels), "ADDED": added}
    launch(hopper.forward_kernel, grid, FORWARD_HOPPER, (x, *norm, w, out, rows, eps), **sizes)
    return out


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
    if config is None and _shares_weights(x, w):
        return _input_gradient_hopper(x, norm, w, dy, eps, more)
    config = config or _config("input_gradient", x, w.dtype)
    programs, group = spread(ceil_div(rows, config.constants["BM"]), config, channels, w)
    dx = torch.empty_like(x)
    n = torch.empty((rows, channels), dtype=w.dtype, device=x.device)
    shares = torch.empty((programs, 2 * channels), dtype=torch.float32, device=x.device)
    arguments = (x, *norm, w, dy, dx, n, shares, x if more is None else more, rows, group, eps)
    sizes = _sizes(w, channels, x.device) | _form("JOINT", config) | {"MORE": more is not None}
    launch(kernels.input_gradient_kernel, (programs, 1, 1), config, arguments, **sizes)
    return dx, n, shares


def _shares_weights(x: Tensor, w: Tensor) -> bool:
    """Whether the input gradient is that of `hopper_gradient`."""
    round_trip = 2 * GRADIENT_HOPPER.constants["STAGES"] * GRADIENT_UNITS
    fits = x.shape[1] == 128 and w.numel() // (3 * 128) % round_trip == 0
    dtypes = w.dtype == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32)
    return fits and dtypes and runs_gluon(x.device)


def _input_gradient_hopper(
    x: Tensor, norm: tuple[Tensor, Tensor], w: Tensor, dy: Tensor, eps: float, more: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from optimized.ops.transition import hopper_gradient

    rows, channels = x.shape
    hidden = w.numel() // (3 * channels)
    chunks = hidden // GRADIENT_UNITS
    arranged = torch.empty_like(w)
    launch(hopper_gradient.arrange_kernel, (chunks, 1, 1), ARRANGE, (w, arranged), H=hidden)
    programs, group = one_each(ceil_div(rows, GRADIENT_ROWS), x.device)
    dx, n = torch.empty_like(x), torch.empty((rows, channels), dtype=w.dtype, device=x.device)
    shares = torch.empty((2 * programs, 2 * channels), dtype=torch.float32, device=x.device)
    turns = chunks // GRADIENT_HOPPER.constants["STAGES"]
    arguments = (x, *norm, arranged, dy, dx, n, shares, x if more is None else more, rows, group, turns, eps)
    sizes = {"CHUNKS": chunks, "MORE": more is not None}
    launch(hopper_gradient.input_gradient_kernel, (programs, 1, 1), GRADIENT_HOPPER, arguments, **sizes)
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
    weights: list[Tensor],
    eps: float,
    dtype: torch.dtype,
    added: bool,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, w_a, w_b, w_out one after another in one vector; products in `dtype`.

    `added`: dy is the gradient of x + y.
    """
    w, narrow = pack(weights, dtype), dy.to(dtype)
    dx, n, shares = input_gradient(x, norm, w, narrow, eps, more=dy if added else None)
    return dx, fold([shares], [weight_gradient(n, w, narrow)], gradient_dtype((*norm, *weights)))
