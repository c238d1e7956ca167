"""What triangle multiplication's launches are made of: tile shapes, sizes of a call, packed and folded weights."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import (
    ceil_div,
    chosen,
    fast_sigmoid,
    on_hopper,
    product_width,
    runs_gluon,
    tile,
)
from optimized.ops.parameters import pack
from optimized.ops.triangle_multiplication import folded
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

ALIGNMENT = 16


def turned(rows: int, width: int, warps: int, stages: int) -> Config:
    """A tile of the projections' weight gradient in the form whose products have channels as rows."""
    config = tile(rows, width, warps, stages)
    return Config(config.constants | {"TURNED": 1}, warps)


# The fastest of the tiles measured on an H200 at 384 and 768 tokens; channels are the rows of the weight gradient.
HALF = {
    "project": tile(64, 128, 4, 2),
    "project_weight": turned(64, 64, 4, 3),
    "output": tile(64, 128, 4, 1),
    # (64, 128, 4, 1) is faster still on an H200, whose own file has it for fp16; it needs 176 KiB on an A100.
    "output_backward": tile(64, 32, 4, 1),
    "output_weight": tile(64, 64, 4, 3),
    # On Hopper only: see `folds_output`.
    "output_folded": tile(64, 128, 8, 3),
    "output_backward_folded": tile(64, 128, 8, 3),
    "output_weight_folded": tile(64, 64, 4, 3),
    "project_folded": tile(64, 64, 4, 4),
    "input_gradient": tile(64, 64, 4, 2),
}
# Weight gradients have c or h rows: more than four warps would share 64 of them.
HALF_NARROW = {
    "project": tile(128, 64, 8, 2),
    "project_weight": tile(64, 32, 4, 2),
    "output": tile(64, 32, 4, 1),
    "output_backward": tile(64, 32, 4, 2),
    "output_weight": tile(64, 64, 4, 3),
    "output_folded": tile(64, 64, 4, 2),
    "output_backward_folded": tile(32, 64, 4, 2),
    "output_weight_folded": tile(64, 64, 4, 3),
    "project_folded": tile(64, 64, 4, 2),
    "input_gradient": tile(64, 64, 4, 2),
}
FULL = dict.fromkeys((*HALF, "project_input"), tile(32, 16, 8, 1))


# Of the kernels for Hopper; STAGES: tiles on their way or in use. Where there are four warps, the kernel adds four.
PROJECT_HOPPER = Config({}, 4)
OUTPUT_HOPPER = Config({"STAGES": 4}, 8)
GRADIENT_HOPPER = Config({}, 4)
FOLD_WEIGHTS = Config({"ROWS": 16}, 4)
MOMENTS = Config({"BLOCK": 1024}, 4)
Z_STATISTICS = Config({"CHANNELS": 32, "BLOCK": 32}, 4)
NORMALISE = Config({"BLOCK": 32}, 4)
X_STATISTICS = Config({"CHANNELS": 32, "BLOCK": 64}, 2)


def default(kernel: str, channels: int, dtype: torch.dtype) -> Config:
    """The tile shape of `triangle_multiplication.<kernel>` where no tuning file has one."""
    table = FULL if dtype == torch.float32 else HALF_NARROW if channels <= 64 else HALF
    return table[kernel.partition(".")[2]]


def config_of(kernel: str, shape: "Shape", x: Tensor) -> Config:
    """The tile of `triangle_multiplication.<kernel>` for a call: tuned for the device of x, or the default."""
    return chosen(f"triangle_multiplication.{kernel}", shape.channels, x.dtype, x.device, default)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: N tokens, P = N rounded up, c and h channels."""

    tokens: int
    padded: int
    channels: int
    hidden: int

    @staticmethod
    def of(z: Tensor, hidden: int) -> "Shape":
        """The sizes for a pair tensor `[N, N, c]`."""
        tokens = z.shape[0]
        return Shape(tokens, -(-tokens // ALIGNMENT) * ALIGNMENT, z.shape[2], hidden)

    def blocks(self, w: Tensor) -> dict[str, int]:
        """Compile-time sizes of the kernels, for weights `w`."""
        c, h = self.channels, self.hidden
        blocks = {"C": c, "H": h, "BC": product_width(c), "BH": product_width(h)}
        return blocks | {"FAST": fast_sigmoid(w.dtype, w.device)}

    def statistics(self, keep: bool) -> tuple[int, int, int]:
        """Shape of the statistics, two of x and three of z, that the forward pass keeps, or does not."""
        return (5, self.padded, self.padded) if keep else (0, 0, 0)

    def inner(self, w: Tensor) -> dict[str, int]:
        """The same for kernels that do not see the contraction."""
        blocks = self.blocks(w)
        del blocks["BH"]
        return blocks

    def place(self, z: Tensor) -> tuple[int, int, int, int]:
        """Run-time sizes: N, P and the strides of z."""
        return self.tokens, self.padded, z.stride(0), z.stride(1)


def pack_weights(w: TriangleWeights, dtype: torch.dtype) -> Tensor:
    """a_p, b_p, a_g, b_g `[h, c]`, out `[c, h]` and g `[c, c]` one after another in `dtype`."""
    return pack([w.a_p, w.b_p, w.a_g, w.b_g, w.out, w.g], dtype)


class Folded(NamedTuple):
    """The weights with γ, β and the sigmoid's factor folded into them: see `folded`."""

    weights: Tensor
    """As `pack_weights` orders them."""
    sums: Tensor
    """In fp32, of the folded rows and of β times the rows: both of the input projections, of out, of g."""


def folds(z: Tensor, dtype: torch.dtype) -> bool:
    """Whether the projections may multiply z as it is."""
    return z.dtype == dtype and dtype.itemsize == 2


def normalises(z: Tensor, hidden: int, dtype: torch.dtype) -> bool:
    """Whether z, in float32, is normalised beforehand, so that the kernels for raw rows take x̂ in its place."""
    return z.dtype == torch.float32 and _raw_output(z, hidden, dtype)


MOST_RESIDENT = 128
"""Channels up to which a program holds both matrices of the output side in shared memory."""


def folds_output(z: Tensor, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the output side is that of `folded_output`, so that the forward pass keeps statistics."""
    return (folds(z, dtype) or z.dtype == torch.float32) and _raw_output(z, hidden, dtype)


def _raw_output(z: Tensor, hidden: int, dtype: torch.dtype) -> bool:
    """Only where the matrix unit reads both operands from shared memory: elsewhere the weights would fill the registers."""
    if dtype != torch.bfloat16 or max(z.shape[2], hidden) > MOST_RESIDENT:
        return False
    return z.device.type == "cpu" or on_hopper(z.device)


HOPPER_CHANNELS, HOPPER_TILE = 128, 64
"""The one number of channels, of z and of the contraction, that the kernels for Hopper know; positions of their tiles."""


def overlaps(z: Tensor, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are those of `hopper`: where `folds_output`, and copies of 16 bytes can fetch z."""
    widths = z.shape[2] == hidden == HOPPER_CHANNELS
    if not (widths and dtype == torch.bfloat16 and runs_gluon(z.device)):
        return False
    # A z in float32 is normalised into a tensor of its own.
    return z.dtype != dtype or (z.stride(0) % 16 == 0 and z.stride(1) % 16 == 0 and z.data_ptr() % 16 == 0)


def fold_weights(w: TriangleWeights, dtype: torch.dtype) -> tuple[Folded, Tensor]:
    """The weights folded, and as `pack_weights` has them, in one launch."""
    c, h = w.out.shape
    if len({t.dtype for t in w}) > 1 or not all(t.is_contiguous() for t in w):
        w = TriangleWeights(*(t.float().contiguous() for t in w))
    matrices = (w.a_p, w.b_p, w.a_g, w.b_g, w.out, w.g)
    plain = torch.empty(5 * h * c + c * c, dtype=dtype, device=w.out.device)
    weights = torch.empty_like(plain)
    sums = torch.empty(8 * h + 4 * c, dtype=torch.float32, device=w.out.device)
    norms = (w.norm_in_weight, w.norm_in_bias, w.norm_out_weight, w.norm_out_bias)
    arguments = (*matrices, *norms, plain, weights, sums)
    sizes = {"C": c, "H": h, "BLOCK": product_width(max(c, h)), "FAST": fast_sigmoid(dtype, weights.device)}
    grid = (ceil_div(max(c, h), FOLD_WEIGHTS.constants["ROWS"]), len(matrices), 1)
    launch(folded.fold_weights_kernel, grid, FOLD_WEIGHTS, arguments, **sizes)
    return Folded(weights, sums), plain
