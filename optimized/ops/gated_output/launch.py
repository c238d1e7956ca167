"""Launches of the kernels at the end of an update: tile shapes, grids and workspaces."""

from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.conditioned_transition.launch import grid
from optimized.ops.conditioned_transition.launch import tile as flat_tile
from optimized.ops.gated_output import kernels
from optimized.ops.launcher import launch
from optimized.ops.launching import (
    ceil_div,
    chosen,
    one_each,
    processors,
    product_width,
    resized,
    runs_gluon,
    tile,
)
from optimized.ops.library_products import side_by_side, side_by_side_backward, weight_product
from optimized.ops.tuning import Config

MAX_FUSED = 256
"""Channels up to which a row tile and the weight stay on the chip."""
BLOCK = 2048
"""Elements per program of the elementwise kernels of the wide form."""
FLAT = Config({"BLOCK": BLOCK}, 4)
# Of the kernel in `hopper`.
HOPPER, HOPPER_ROWS, HOPPER_WIDTH = Config({}, 8), 64, 128


def _forward(config: Config) -> dict[str, Config]:
    """`forward_wide` is the same kernel with results wider than its products are."""
    return {"forward": config, "forward_wide": config}


HALF = _forward(tile(64, 64, 4, 1)) | {"backward": tile(128, 64, 8, 2)}
# The weight gradient has c rows: more than four warps would share 64 of them.
HALF_NARROW = HALF | {"backward": tile(64, 64, 4, 2)}
HALF_WIDE = _forward(tile(128, 64, 8, 1)) | {"backward": tile(32, 32, 8, 1)}
FULL = _forward(tile(32, 16, 4, 1)) | {"backward": tile(32, 16, 8, 1)}


class Keep(NamedTuple):
    """Dropout factors of rows (i, j): a tensor, its strides along i and j, and the number of j."""

    values: Tensor
    row: int
    column: int
    columns: int

    @staticmethod
    def of(keep: Tensor | None, shape: torch.Size, other: Tensor) -> "Keep":
        """The factors for an update of `shape` `[..., I, J, c]`; `other` is any tensor, read if there are none.

        Leading axes are merged with i where they can be without a copy.
        """
        columns = shape[-2] if len(shape) > 1 else 1
        if keep is None:
            return Keep(other, 0, 0, columns)
        if keep.shape[-1] == 1 or keep.stride(-1) != 1:  # before the shared axis is spread out
            keep = keep.expand(*keep.shape[:-1], shape[-1]).contiguous()
        rows = keep.expand(shape).reshape(-1, columns, shape[-1])
        return Keep(rows, rows.stride(0), rows.stride(1), columns)


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `gated_output.<kernel>` where no tuning file has one.

    `channels` are what the kernel holds at full width: of x forward, of the result backward.
    """
    name = kernel.partition(".")[2]
    if name == "residual":
        return flat_tile(channels)
    if dtype == torch.float32:
        return FULL[name]
    return (HALF_NARROW if channels <= 64 else HALF if channels <= 128 else HALF_WIDE)[name]


def _config(kernel: str, channels: int, dtype: torch.dtype, device: torch.device) -> Config:
    return chosen(f"gated_output.{kernel}", channels, dtype, device, default)


def fused(weight: Tensor) -> bool:
    """Whether the projection happens inside the kernel."""
    return max(weight.shape) <= MAX_FUSED


def forward(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    keep: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """out `[rows, c]` of `shape` `[..., I, J, c]` from rows x, g `[rows, h]` and residual `[rows, c]`."""
    rows, hidden = x.shape
    channels = weight.shape[0]
    wide_dtype = dtype if residual is None else torch.promote_types(residual.dtype, dtype)
    if not fused(weight):
        return add(residual, side_by_side(gate(x, g, dtype), [weight]), keep, shape, wide_dtype)
    # A tile of its own: what is added then takes twice the registers.
    kernel = "forward_wide" if wide_dtype.itemsize > dtype.itemsize else "forward"
    config = config or _config(kernel, hidden, dtype, x.device)
    out = torch.empty((rows, channels), dtype=wide_dtype, device=x.device)
    mask = Keep.of(keep, shape, out)
    source = out if residual is None else residual
    arguments = (x, g, weight.to(dtype).contiguous(), source, mask.values, out, rows)
    sizes = {"RESIDUAL": residual is not None, "KEEP": keep is not None, "C": channels, "H": hidden}
    sizes["BH"] = product_width(hidden)
    places = (mask.columns, mask.row, mask.column)
    grid_size = (ceil_div(rows, config.constants["BM"]), 1, 1)
    launch(kernels.forward_kernel, grid_size, config, arguments + places, **sizes)
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
    config: Config | None = None,
    spent: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dg, and the gradient of the weight in fp32.

    `spent`: g is not needed any more, and dg takes its place in memory; dx is in `dtype`, whatever x is in.
    """
    rows, hidden = x.shape
    channels = weight.shape[0]
    if config is None and _stays_on_chip(dout, x, g, weight, dtype, spent):
        return _backward_hopper(dout, x, g, weight, keep, shape, spent)
    if spent or not fused(weight):
        return library_backward(add(None, dout, keep, shape, dtype), x, g, weight, spent)
    config = config or _config("backward", channels, dtype, x.device)
    config = resized(config, min(config.constants["BN"], product_width(hidden)))
    mask = Keep.of(keep, shape, dout)
    chunks = ceil_div(hidden, config.constants["BN"])
    splits = max(1, min(2 * processors(x.device) // chunks, ceil_div(rows, config.constants["BM"])))
    dx, dg = torch.empty_like(x), torch.empty_like(g)
    shares = torch.empty((splits, channels, hidden), dtype=torch.float32, device=x.device)
    tensors = (x, g, weight.to(dtype).contiguous(), mask.values, dout, dx, dg, shares)
    places = (rows, mask.columns, splits, mask.row, mask.column)
    sizes = {"KEEP": keep is not None, "C": channels, "H": hidden, "BC": product_width(channels)}
    launch(kernels.backward_kernel, (chunks, splits, 1), config, tensors + places, **sizes)
    return dx, dg, shares.sum(0)


def _stays_on_chip(
    dout: Tensor, x: Tensor, g: Tensor, weight: Tensor, dtype: torch.dtype, spent: bool
) -> bool:
    """Whether the gradients are those of the kernel in `hopper`, which copies of 16 bytes feed and dx leaves in bf16."""
    half = (torch.bfloat16, torch.float16)
    dtypes = dtype == g.dtype == torch.bfloat16 and dout.dtype in (torch.bfloat16, torch.float32)
    dtypes = dtypes and (x.dtype in half if spent else x.dtype == torch.bfloat16)
    fits = x.shape[0] >= HOPPER_ROWS and tuple(weight.shape) == (HOPPER_WIDTH, HOPPER_WIDTH)
    copied = all(t.data_ptr() % 16 == 0 for t in (dout, x, g))
    return fits and dtypes and copied and runs_gluon(x.device)


def _backward_hopper(
    dout: Tensor, x: Tensor, g: Tensor, weight: Tensor, keep: Tensor | None, shape: torch.Size, spent: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from optimized.ops.gated_output import hopper

    rows = x.shape[0]
    mask = Keep.of(keep, shape, dout)
    programs, group = one_each(ceil_div(rows, HOPPER_ROWS), x.device)
    dx, dg = torch.empty_like(g), g if spent else torch.empty_like(g)
    shares = torch.empty((programs, *weight.shape), dtype=torch.float32, device=x.device)
    tensors = (dout, g, x, weight.to(g.dtype).contiguous(), mask.values, dx, dg, shares)
    arguments = (*tensors, rows, mask.columns, mask.row, mask.column, group)
    launch(hopper.backward_kernel, (programs, 1, 1), HOPPER, arguments, KEEP=keep is not None)
    return dx, dg, shares.sum(0)


def library_backward(
    du: Tensor, x: Tensor, g: Tensor, weight: Tensor, spent: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, from the gradient of the product: two library products around one elementwise kernel.

    `spent`: g is not needed any more, and dg takes its place in memory.
    """
    dx, dg, gated = gate_backward(x, g, side_by_side_backward(du, [weight]), spent)
    return dx, dg, weight_product(du, gated)


def gate(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """σ(g) ⊙ x `[rows, h]` in `dtype`, elementwise."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, width = x.shape
    launch(kernels.gate_kernel, (ceil_div(x.numel(), BLOCK), 1, 1), FLAT, (x, g, out, rows), H=width)
    return out


def gate_backward(x: Tensor, g: Tensor, dgated: Tensor, spent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dg and σ(g) ⊙ x in the dtype of its gradient.

    `spent`: g and `dgated` are not needed any more; dg takes the place of g, and dx that of `dgated`, whose dtype it has.
    Every thread reads its values before it writes them.
    """
    dg, gated = g if spent else torch.empty_like(g), torch.empty_like(dgated)
    dx = dgated if spent else torch.empty_like(x)
    rows, width = x.shape
    arguments = (x, g, dgated, dx, dg, gated, rows)
    launch(kernels.gate_backward_kernel, (ceil_div(x.numel(), BLOCK), 1, 1), FLAT, arguments, H=width)
    return dx, dg, gated


def add(
    residual: Tensor | None, update: Tensor, keep: Tensor | None, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """residual + keep ⊙ update `[rows, c]` in `dtype`; the update itself where there is nothing to do."""
    if residual is None and keep is None and update.dtype == dtype:
        return update
    rows, channels = update.shape
    out = torch.empty((rows, channels), dtype=dtype, device=update.device)
    mask = Keep.of(keep, shape, update)
    config = _config("residual", channels, dtype, update.device)
    source = update if residual is None else residual
    arguments = (source, update, mask.values, out, rows, mask.columns, mask.row, mask.column)
    sizes = {"RESIDUAL": residual is not None, "KEEP": keep is not None, "C": channels}
    launch(kernels.residual_kernel, grid(rows, channels, config), config, arguments, **sizes)
    return out
