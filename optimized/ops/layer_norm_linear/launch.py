"""Launches of the LayerNorm + Linear kernels: tile shapes, grids and workspaces."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, chosen, one_each, processors, product_width, runs_gluon, tile
from optimized.ops.layer_norm_linear import kernels
from optimized.ops.parameters import fold, gradient_dtype
from optimized.ops.tuning import Config

HALF = {
    "forward": tile(64, 64, 4, 2),
    "input_gradient": tile(128, 64, 8, 3, 128),
    "weight_gradient": tile(64, 64, 4, 4),
    "bias_gradient": tile(32, 64, 4, 1),
}
"""`bias_gradient` is the input gradient of a head weight alone, which waits for memory.

The input gradient reads the weights once for every BM rows: at 64 they are twice as many bytes (from L2) as one gradient.
"""
NARROW, NARROW_WIDE = Config({"BM": 64, "BN": 16}), Config({"BM": 32, "BN": 16})
"""Of a narrow map alone in fp32, up to 128 channels and beyond: half a row's columns are as many registers of a thread."""
HALF_WIDE = dict.fromkeys(HALF, tile(32, 32, 8, 1))
FULL = dict.fromkeys(HALF, tile(32, 16, 8, 1)) | {"bias_gradient": tile(16, 16, 8, 1)}
FOLD = Config({"ROWS": 8})
HOPPER, HOPPER_ROWS, HOPPER_CHANNELS, HOPPER_HEADS = Config({}, 4), 64, 128, 16
"""Of the kernels in `hopper` and `hopper_gradient`, which add eight warps and six: rows of a tile, channels and outputs of a map, the
most of the narrow one."""


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


def overlaps(x: Tensor, widths: Widths, dtype: torch.dtype) -> bool:
    """Whether the forward kernel is that of `hopper`: from a whole tile of rows on."""
    sizes = x.shape[1] == widths.hidden == HOPPER_CHANNELS and widths.heads <= HOPPER_HEADS
    sizes = sizes and x.shape[0] >= HOPPER_ROWS
    dtypes = dtype == torch.bfloat16 and x.dtype in (torch.bfloat16, torch.float32)
    return sizes and dtypes and runs_gluon(x.device)


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
    if not widths.count and w.dtype == torch.float32:
        return [_narrow_map(x, norm, w, widths, eps)]
    outs = [torch.empty((rows, widths.hidden), dtype=w.dtype, device=x.device) for _ in range(widths.count)]
    narrow = [torch.empty((widths.heads, rows), dtype=w.dtype, device=x.device)] if widths.heads else []
    pointers = (x, *norm, w, *_four(outs, w), *(narrow or [w]))
    if config is None and overlaps(x, widths, w.dtype):
        from optimized.ops.layer_norm_linear import hopper

        programs, group = one_each(ceil_div(rows, HOPPER_ROWS), x.device)
        arguments = (*pointers, rows, group, eps)
        sizes = {"HEADS": widths.heads, "T": widths.count}
        launch(hopper.forward_kernel, (programs, 1, 1), HOPPER, arguments, **sizes)
        return outs + narrow
    config = config or _config("forward", x, w.dtype)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    blocks = widths.blocks(channels) | {"SHORT": rows < config.constants["BM"]}
    launch(kernels.forward_kernel, grid, config, (*pointers, rows, eps), **blocks)
    return outs + narrow


def narrow_config(channels: int) -> Config:
    """Of `narrow_kernel`."""
    return NARROW if channels <= 128 else NARROW_WIDE


def _narrow_map(x: Tensor, norm: tuple[Tensor, Tensor], w: Tensor, widths: Widths, eps: float) -> Tensor:
    """The result `[heads, rows]` of a head weight in fp32 without others beside it."""
    rows, channels = x.shape
    config = narrow_config(channels)
    s = torch.empty((widths.heads, rows), dtype=w.dtype, device=x.device)
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    launch(kernels.narrow_kernel, grid, config, (x, *norm, w, s, rows, eps), C=channels, HEADS=widths.heads)
    return s


def fold_weights(w: Tensor, gamma: Tensor) -> Tensor:
    """γ ⊙ w less its mean, row by row, of packed weights: what `input_gradient` multiplies by."""
    channels = gamma.numel()
    rows = w.numel() // channels
    folded = torch.empty_like(w)
    blocks = {"C": channels, "BC": product_width(channels)}
    grid = (ceil_div(rows, FOLD.constants["ROWS"]), 1, 1)
    launch(kernels.fold_weights_kernel, grid, FOLD, (w, gamma, folded, rows), **blocks)
    return folded


def _overlaps_backward(x: Tensor, widths: Widths, dtype: torch.dtype, grads: list[Tensor]) -> bool:
    """Whether the input gradient is that of `hopper_gradient`: of four maps, whose gradients copies of 16 bytes can fetch."""
    copied = all(dy.dtype == dtype and dy.data_ptr() % 16 == 0 for dy in grads[:4])
    return widths.count == 4 and copied and overlaps(x, widths, dtype)


def input_gradient(
    x: Tensor,
    folded: Tensor,
    widths: Widths,
    grads: list[Tensor],
    eps: float,
    config: Config | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and x̂, which is LN(x) without γ and β, in the weights' dtype.

    `more`: another gradient of x, which is added to dx.
    """
    rows, channels = x.shape
    dx = torch.empty_like(x)
    normal = torch.empty((rows, channels), dtype=folded.dtype, device=x.device)
    pointers = (*_four(grads[: widths.count], folded), grads[-1], dx, normal, x if more is None else more)
    if config is None and _overlaps_backward(x, widths, folded.dtype, grads):
        from optimized.ops.layer_norm_linear import hopper_gradient

        programs, group = one_each(ceil_div(rows, HOPPER_ROWS), x.device)
        sizes = {"HEADS": widths.heads, "MORE": more is not None}
        arguments = (x, folded, *pointers, rows, group, eps)
        launch(hopper_gradient.input_gradient_kernel, (programs, 1, 1), HOPPER, arguments, **sizes)
        return dx, normal
    config = config or _config("input_gradient" if widths.count else "bias_gradient", x, folded.dtype)
    arguments = (x, folded, *pointers, rows, eps)
    blocks = widths.blocks(channels) | {"SHORT": rows < config.constants["BM"], "MORE": more is not None}
    grid = (ceil_div(rows, config.constants["BM"]), 1, 1)
    launch(kernels.input_gradient_kernel, grid, config, arguments, **blocks)
    return dx, normal


@dataclass(frozen=True)
class Sums:
    """How the weight gradients of T ≤ 4 maps are summed: tile, programs for all outputs, and shares of the rows."""

    config: Config
    programs: int
    splits: int

    @staticmethod
    def of(normal: Tensor, grads: list[Tensor], config: Config | None = None) -> "Sums":
        """For these gradients `[rows, h]`."""
        hidden = grads[0].shape[1]
        config = config or _config("weight_gradient", normal, normal.dtype)
        if config.constants["BN"] > product_width(hidden):
            config = narrowed(config, product_width(hidden))
        programs = len(grads) * ceil_div(hidden, config.constants["BN"])
        steps = ceil_div(normal.shape[0], config.constants["BM"])
        return Sums(config, programs, max(1, min(2 * processors(normal.device) // programs, steps)))


def weight_gradient(
    normal: Tensor, norm: tuple[Tensor, Tensor], w: Tensor, grads: list[Tensor], sums: Sums, shares: Tensor
) -> Tensor:
    """Partial weight gradients `[splits, T·h·c]` in fp32 of T maps from their gradients `[rows, h]` (equal strides).

    `w`: their weights, packed. The norm's gradients through them go to `shares` `[programs · splits, 2c]`.
    """
    rows, channels = normal.shape
    hidden = grads[0].shape[1]
    shape = (sums.splits, len(grads) * hidden * channels)
    partial = torch.empty(shape, dtype=torch.float32, device=normal.device)
    strides = (grads[0].stride(0), grads[0].stride(1))
    arguments = (
        normal, *norm, w, *_four(grads, normal), partial, shares, rows, sums.splits, *strides,
    )  # fmt: skip
    blocks = {"C": channels, "H": hidden, "T": len(grads), "BC": product_width(channels)}
    grid = (sums.programs, sums.splits, 1)
    launch(kernels.weight_gradient_kernel, grid, sums.config, arguments, **blocks)
    return partial


def backward(
    grads: list[Tensor],
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    head: Tensor | None,
    w: Tensor,
    eps: float,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and the gradients of γ, β, the weights and the head weight one after another in one vector; `w` as forward.

    `more` as of `input_gradient`.
    """
    widths = Widths.of(weights, head)
    matrices = [*weights, head] if head is not None else weights
    dx, normal = input_gradient(x, fold_weights(w, norm[0]), widths, grads, eps, more=more)
    end = widths.count * widths.hidden * x.shape[1]
    parts = [(grads[: widths.count], w[:end])] if weights else []
    if head is not None:
        parts.append(([grads[-1].t()], w[end:]))
    sums = [Sums.of(normal, part) for part, _ in parts]
    counts = [s.programs * s.splits for s in sums]
    shares = torch.empty((sum(counts), 2 * x.shape[1]), dtype=torch.float32, device=x.device)
    partials = [
        weight_gradient(normal, norm, own, part, s, share)
        for (part, own), s, share in zip(parts, sums, shares.split(counts), strict=True)
    ]
    return dx, fold([shares], partials, gradient_dtype((*norm, *matrices)))
