"""Launches of the averaging kernels: tile shapes, grids and workspaces."""

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, checked, chosen, power_of_two, processors, resized
from optimized.ops.pair_weighted_averaging import kernels
from optimized.ops.pair_weighted_averaging.op import padded
from optimized.ops.tuning import Config

SOFTMAX = Config({"BJ": 128}, 4)
"""Tokens j per step of the softmax kernels."""


def tile(rows: int, columns: int, depth: int, warps: int, stages: int) -> Config:
    """BM rows by BN columns per program, BK deep, warps, depth of the load pipeline."""
    return checked(Config({"BM": rows, "BN": columns, "BK": depth, "STAGES": stages}, warps))


HALF = {"average": tile(128, 128, 64, 8, 3), "weight": tile(128, 128, 64, 8, 3)}
FULL = {"average": tile(32, 32, 32, 4, 1), "weight": tile(32, 32, 32, 4, 1)}


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `pair_weighted_averaging.<kernel>` where no tuning file has one; `channels` per head."""
    return (FULL if dtype == torch.float32 else HALF)[kernel.partition(".")[2]]


def _config(kernel: str, v: Tensor) -> Config:
    return chosen(f"pair_weighted_averaging.{kernel}", v.shape[3], v.dtype, v.device, default)


def _softmax_sizes(heads: int, mask: Tensor | None, dtype: torch.dtype) -> dict[str, int]:
    exact = dtype == torch.float32
    return {"MASKED": mask is not None, "EXACT": exact, "H": heads, "BH": power_of_two(heads)}


def softmax(logits: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w `[H, I, J padded]` in `dtype` from logits `[H, I, J]` of any strides, and lse `[I, H]`, in base 2 but for fp32."""
    heads, rows, columns = logits.shape
    pitch = padded(columns)
    w = torch.empty((heads, rows, pitch), dtype=dtype, device=logits.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=logits.device)
    arguments = (logits, logits if mask is None else mask, w, lse, rows, columns, pitch, *logits.stride())
    sizes = _softmax_sizes(heads, mask, dtype)
    launch(kernels.softmax_kernel, (rows, 1, 1), SOFTMAX, arguments, **sizes)
    return w, lse


def softmax_backward(
    shares: Tensor, logits: Tensor, mask: Tensor | None, lse: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of logits, in their dtype and memory order, from shares of dw `[splits, H, I, J]`; `dtype` of w."""
    heads, rows, columns = logits.shape
    dlogits = torch.empty_like(logits)
    if dlogits.stride() != logits.stride():
        logits = logits.contiguous()
    places = (rows, columns, shares.shape[0], *logits.stride())
    arguments = (logits, logits if mask is None else mask, lse, shares, dlogits, *places)
    sizes = _softmax_sizes(heads, mask, dtype)
    launch(kernels.softmax_backward_kernel, (rows, 1, 1), SOFTMAX, arguments, **sizes)
    return dlogits


def average(w: Tensor, v: Tensor, length: int, transposed: bool) -> Tensor:
    """o `[S, length, H, d]` from contiguous v `[S, L, H, d]`; L and `length` are J and I, or I and J if `transposed`."""
    samples, columns, heads, width = v.shape
    config = _config("average", v)
    config = resized(config, max(config.constants["BN"], width))
    out = v.new_empty((samples, length, heads, width))
    tile_rows, tile_columns = config.constants["BM"], config.constants["BN"]
    grid = (heads * ceil_div(length, tile_rows), ceil_div(samples * width, tile_columns), 1)
    arguments = (w, v, out, length, columns, samples, w.shape[1], w.shape[2])
    sizes = {"TRANSPOSED": transposed, "H": heads, "D": width}
    launch(kernels.average_kernel, grid, config, arguments, **sizes)
    return out


def weight_gradient(do: Tensor, v: Tensor) -> Tensor:
    """Shares of dw `[splits, H, I, J]` in fp32 from contiguous do `[S, I, H, d]` and v `[S, J, H, d]`."""
    samples, rows, heads, width = do.shape
    columns = v.shape[1]
    config = _config("weight", v)
    shape = config.constants
    tiles = ceil_div(rows, shape["BM"]) * ceil_div(columns, shape["BN"])
    runs = ceil_div(samples * width, shape["BK"])
    splits = max(1, min(2 * processors(v.device) // (tiles * heads), runs))
    shares = torch.empty((splits, heads, rows, columns), dtype=torch.float32, device=v.device)
    arguments = (do, v, shares, rows, columns, samples, splits)
    grid = (tiles, heads, splits)
    launch(kernels.weight_gradient_kernel, grid, config, arguments, H=heads, D=width)
    return shares


def forward(v: Tensor, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """o `[S, I, H, d]`, w and lse."""
    w, lse = softmax(logits, mask, v.dtype)
    return average(w, v, logits.shape[1], transposed=False), w, lse


def backward(
    do: Tensor, v: Tensor, logits: Tensor, mask: Tensor | None, w: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """dv and the gradient of logits."""
    dv = average(w, do, v.shape[1], transposed=True)
    return dv, softmax_backward(weight_gradient(do, v), logits, mask, lse, v.dtype)
