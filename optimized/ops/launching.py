"""Host side shared by the fused operators: compute dtype, tile shapes, how many programs share a sum."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from optimized.ops.tuning import Config, architecture, forget_with, lookup

_Default = Callable[[str, int, torch.dtype], Config]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where autocast is on, the input's otherwise."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. (Triton's own function of this kind costs microseconds on the host.)"""
    return -(-a // b)


@cache
def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n = 0."""
    return 1 << max(n - 1, 0).bit_length()


def product_width(n: int) -> int:
    """The side of a matrix product's tile that holds n: a power of two, and 16 at least, as Triton wants on a GPU."""
    return max(16, power_of_two(n))


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of the device; 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def spread(steps: int, config: Config, channels: int, w: Tensor, columns: int = 1) -> tuple[int, int]:
    """How many programs take `steps` tiles of rows, and how many consecutive tiles each takes, so that none is left over
    when the others are done.

    `columns`: how many programs take the same tiles; `w`: the weights, for their dtype and device. Where 16-bit products
    are 128 channels wide, eight warps fill the registers of a multiprocessor: there is one wave of programs. Of others it
    holds one to four programs of four warps: twelve are whole waves of each.
    """
    fills = (channels >= 128 and w.element_size() == 2) or w.device.type != "cuda"
    programs = max(1, (8 if fills else 48) // config.num_warps) * processors(w.device)
    group = ceil_div(steps, max(1, programs // columns))
    return ceil_div(steps, group), group


def one_each(tiles: int, device: torch.device) -> tuple[int, int]:
    """How many programs, one on each multiprocessor, take `tiles`, and how many consecutive ones each takes."""
    group = ceil_div(tiles, processors(device))
    return ceil_div(tiles, group), group


@cache
def fast_sigmoid(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the sigmoid may use the hardware's tanh, whose error of 2⁻¹¹ is lost in bf16's 2⁻⁹."""
    return dtype == torch.bfloat16 and device.type == "cuda" and torch.version.hip is None


@cache
def on_hopper(device: torch.device) -> bool:
    """Whether the device is an H100, H200 or the like."""
    # Without a GPU, for fake tensors of one, there is nothing to ask.
    return device.type == "cuda" and torch.cuda.is_available() and architecture(device) == "sm_90"


@cache
def has_gluon() -> bool:
    """Whether this Triton has Gluon, its lower level, as the kernels in it know it."""
    try:
        from optimized.ops import gluon_parts  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return True


def runs_gluon(device: torch.device) -> bool:
    """Whether the kernels in Gluon, all of them for Hopper, run there."""
    return on_hopper(device) and has_gluon()


# Kernels whose products have BN rows, or twice as many: the tile's BM positions are their columns or summed over.
SUMMING = (
    "triangle_multiplication.output_weight",
    "triangle_multiplication.output_folded",
    "triangle_multiplication.output_backward_folded",
    "triangle_multiplication.output_weight_folded",
    "layer_norm_linear.weight_gradient",
)


def checked(config: Config, kernel: str = "") -> Config:
    """`config` itself; ValueError where its warps outnumber the rows of the kernel's products.

    From 64 rows on, Hopper multiplies in warp groups of 64 rows. With fewer than 16 rows a warp, two groups
    compute the same rows: twice the matrix work for nothing. Triton 3.6 also made one such shape (the
    transition's weight gradient, 64 rows, 32 wide, 8 warps) end in an illegal memory access on an H200, though
    every address in its PTX lies inside its buffers.
    """
    summing = kernel in SUMMING or config.constants.get("TURNED", 0)
    rows = config.constants["BN" if summing else "BM"]
    if 64 <= rows < 16 * config.num_warps:
        raise ValueError(
            f"{rows} rows for {config.num_warps} warps; at most {rows // 16} warps can share them"
        )
    return config


def tile(rows: int, width: int, warps: int, stages: int, max_registers: int = 0) -> Config:
    """A launch configuration: BM rows and BN output channels per step, warps, depth of the load pipeline."""
    return Config({"BM": rows, "BN": width, "STAGES": stages}, warps, max_registers=max_registers)


# By the id of the tile it was made from, which is kept beside it, so that the id stays taken.
_resized: dict[tuple[int, int], tuple[Config, Config]] = {}


def resized(config: Config, width: int) -> Config:
    """`config` with BN = `width`: always the same object for the same tile, as launches want."""
    if config.constants["BN"] == width:
        return config
    known = _resized.get((id(config), width))
    if known is None:
        known = config, replace(config, constants=config.constants | {"BN": width})
        _resized[id(config), width] = known
    return known[1]


@cache
def chosen(kernel: str, channels: int, dtype: torch.dtype, device: torch.device, default: _Default) -> Config:
    """The configuration of `kernel`: tuned for this device where there is one, else the default for the dtype."""
    key = (str(dtype).removeprefix("torch."), channels)
    return checked(lookup(kernel, key, device, default(kernel, channels, dtype)), kernel)


forget_with(chosen.cache_clear)
