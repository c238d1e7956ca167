"""Host side shared by the fused operators: compute dtype, weight copies, split counts, tile shapes."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from optimized.ops.tuning import Config, lookup

_Default = Callable[[str, int, torch.dtype], Config]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where autocast is on, the input's otherwise."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def in_dtype(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights as contiguous tensors of `dtype`; those that must be converted are copied in one launch."""
    result = list(weights)
    slots = [k for k, w in enumerate(weights) if w.dtype != dtype or not w.is_contiguous()]
    if slots:
        copies = [torch.empty(weights[k].shape, dtype=dtype, device=weights[k].device) for k in slots]
        torch._foreach_copy_(copies, [weights[k] for k in slots])
        for k, copy in zip(slots, copies, strict=True):
            result[k] = copy
    return result


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units of the device; 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def packed(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights `[h, c]` of one shape stacked into one contiguous `[len·h, c]` tensor of `dtype`, in one launch."""
    height, width = weights[0].shape
    whole = torch.empty((len(weights) * height, width), dtype=dtype, device=weights[0].device)
    torch._foreach_copy_(list(whole.split(height)), weights)
    return whole


def unpacked(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive parts of a vector of gradients, in the shapes and dtypes of `parameters`."""
    parts = flat.split([p.numel() for p in parameters])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, parameters, strict=True)]


def checked(config: Config) -> Config:
    """`config` itself; ValueError where its warps outnumber its rows.

    From 64 rows on, Hopper multiplies in warp groups of 64 rows. With fewer than 16 rows a warp, two groups
    compute the same rows: twice the matrix work for nothing. Triton 3.6 also made one such shape (the
    transition's weight gradient, 64 rows, 32 wide, 8 warps) end in an illegal memory access on an H200, though
    every address in its PTX lies inside its buffers.
    """
    rows = config.constants["BM"]
    if 64 <= rows < 16 * config.num_warps:
        raise ValueError(
            f"{rows} rows for {config.num_warps} warps; at most {rows // 16} warps can share them"
        )
    return config


def tile(rows: int, width: int, warps: int, stages: int, max_registers: int = 0) -> Config:
    """A launch configuration: BM rows and BN output channels per step, warps, depth of the load pipeline."""
    return checked(Config({"BM": rows, "BN": width, "STAGES": stages}, warps, max_registers=max_registers))


@cache
def chosen(kernel: str, channels: int, dtype: torch.dtype, device: torch.device, default: _Default) -> Config:
    """The configuration of `kernel`: tuned for this device where there is one, else the default for the dtype."""
    key = (str(dtype).removeprefix("torch."), channels)
    return checked(lookup(kernel, key, device, default(kernel, channels, dtype)))
