"""Host side of the attention kernels: layouts, workspaces, grids and launch configurations."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from optimized.ops.attention.backward import (
    fold_kernel,
    fold_q_kernel,
    grad_bias_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    statistics_kernel,
)
from optimized.ops.attention.forward import forward_kernel
from optimized.ops.tuning import Config, device_name, lookup

TILE = 128  # no tile is longer; buffers are padded to it so that the last tile needs no test
FOLD_BLOCK = 1024
FOLD_LINES = 64


@dataclass(frozen=True)
class Plan:
    """Launch configurations of one call. `grad_q` None: dq comes from the bias-gradient kernel in planes.

    `programs_per_core` sets over how many programs the rows of the bias gradient are split; `part_dtype` is the
    dtype of dq planes (None: that of q).
    """

    forward: Config
    grad_kv: Config
    grad_bias: Config
    grad_q: Config | None
    programs_per_core: int = 4
    part_dtype: torch.dtype | None = None


def _small(rows: int, bq: int, bk: int) -> Config:
    return Config({"ROWS": rows, "BQ": bq, "BK": bk, "STAGES": 2}, 4)


def default_plan(dtype: torch.dtype, head_dim: int, arch: str) -> Plan:
    """Configurations that run everywhere; measured ones replace them through the tuning files."""
    if dtype == torch.float32:
        tile = Config({"BQ": 32, "BK": 32, "STAGES": 1}, 4)
        return Plan(_small(1, 32, 32), _small(1, 32, 32), tile, _small(1, 32, 32))
    if arch != "sm_90":
        fewer = dtype == torch.float16 and arch.startswith("gfx")
        tile = Config({"BQ": 32 if head_dim > 32 else 64, "BK": 64, "STAGES": 1}, 4)
        return Plan(
            _small(1, 32 if fewer else 64, 64),
            _small(1, 64, 32 if head_dim > 32 else 64),
            tile,
            _small(1, 64, 64),
        )
    wide = head_dim > 32
    forward = Config({"ROWS": 1 if wide else 2, "BQ": 128, "BK": 64, "STAGES": 2}, 8)
    grad_kv = Config({"ROWS": 1, "BQ": 64, "BK": 128, "STAGES": 2}, 8)
    grad_bias = Config({"BQ": 64 if wide else 128, "BK": 64, "STAGES": 2}, 4 if wide else 8)
    grad_q = Config({"ROWS": 1 if wide else 2, "BQ": 128, "BK": 64, "STAGES": 2}, 8)
    return Plan(forward, grad_kv, grad_bias, grad_q)


@cache
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942` and so on; `cpu` under the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def plan_for(q: Tensor) -> Plan:
    """The plan for these inputs: measured on this device, shipped for it, or the default."""
    base = default_plan(q.dtype, q.shape[-1], architecture(q.device))
    if device_name(q.device) == "cpu":
        tile = Config({"BQ": 16, "BK": 32, "STAGES": 1}, 4)
        row = Config({"ROWS": 2, "BQ": 16, "BK": 32, "STAGES": 1}, 4)
        return Plan(row, row, tile, None, 2)
    key = (str(q.dtype).removeprefix("torch."), q.shape[-1], length_bucket(q.shape[-2]))
    return Plan(
        lookup("attention.forward", key, q.device, base.forward),
        lookup("attention.grad_kv", key, q.device, base.grad_kv),
        lookup("attention.grad_bias", key, q.device, base.grad_bias),
        lookup("attention.grad_q", key, q.device, base.grad_q) if base.grad_q is not None else None,
    )


def length_bucket(length: int) -> str:
    """Tuning key for a length: short, medium or long."""
    return "short" if length <= 128 else "medium" if length <= 512 else "long"


def cores(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 2 under the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def aligned(x: Tensor) -> Tensor:
    """`x` itself when its last axis is contiguous and rows start at multiples of 8 elements, else a copy."""
    fits = x.stride(-1) == 1 and all(
        s % 8 == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1
    )
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


def strides8(x: Tensor) -> list[int]:
    """Batch, row, head and token strides in units of 8 elements; 0 along axes of size 1."""
    return [s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset along the token axis of any tensor can exceed 31 bits."""
    return any((t.shape[-2] + 256) * t.stride(-2) >= 2**31 for t in tensors)


def prepare_bias(bias: Tensor) -> Tensor:
    """bias [B, H, I, J] as the kernels read it: J contiguous, row pitch and J multiples of 8.

    Anything else, the other orientation included, is copied: as much work as one of the R rows.
    """
    outer = zip(bias.stride()[:-1], bias.shape[:-1], strict=True)
    fits = bias.stride(-1) == 1 and all(s % 8 == 0 for s, n in outer if n > 1)
    if fits and bias.shape[-1] % 8 == 0 and bias.data_ptr() % 16 == 0:
        return bias
    if bias.shape[-1] % 8 == 0:
        return bias.contiguous(memory_format=torch.contiguous_format)
    padded = bias.new_zeros((*bias.shape[:-1], triton.cdiv(bias.shape[-1], 8) * 8))
    padded[..., : bias.shape[-1]].copy_(bias)
    return padded


def bias_strides(x: Tensor) -> list[int]:
    """Batch, head and row strides of a prepared bias in units of 8 elements."""
    return [s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


@dataclass(frozen=True)
class KeyMask:
    """The key mask as the kernels read it: bytes with unit stride along keys, and fp32 weights padded to TILE keys."""

    present: bool
    keep: Tensor
    weights: Tensor

    def keep_strides(self) -> list[int]:
        """Batch and row strides of the bytes."""
        return self._strides(self.keep, 1) if self.present else [0, 0]

    def weight_strides(self) -> list[int]:
        """Batch and row strides of the weights in units of 8."""
        return self._strides(self.weights, 8) if self.present else [0, 0]

    def entry(self, b: int) -> "KeyMask":
        """The mask of one batch entry."""
        if not self.present:
            return self
        return KeyMask(True, self.keep[b : b + 1], self.weights[b : b + 1])

    @staticmethod
    def _strides(x: Tensor, unit: int) -> list[int]:
        return [x.stride(axis) // unit if x.shape[axis] > 1 else 0 for axis in (0, 1)]


def prepare_mask(mask: Tensor | None, like: Tensor) -> KeyMask:
    """A boolean mask [B, R, K] in kernel form; without one, dummies that are never read."""
    if mask is None:
        return KeyMask(False, like, like)
    keep = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    keys = keep.shape[-1]
    weights = torch.empty(
        (*keep.shape[:-1], triton.cdiv(keys, TILE) * TILE), dtype=torch.float32, device=keep.device
    )
    weights[..., :keys].copy_(keep)
    if weights.shape[-1] > keys:
        weights[..., keys:] = 0.0
    return KeyMask(True, keep, weights)


@dataclass(frozen=True)
class Call:
    """Inputs in kernel form: q, k, v [B, R, H, L, D] aligned, bias [B, H, Q, K] with padded keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    mask: KeyMask
    scale: float
    precision: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, heads, queries, keys."""
        return self.q.shape[1], self.q.shape[2], self.q.shape[3], self.k.shape[3]

    def entry(self, b: int) -> "Call":
        """The call for one batch entry."""
        part = slice(b, b + 1)
        return Call(
            self.q[part], self.k[part], self.v[part], self.bias[part], self.mask.entry(b),
            self.scale, self.precision,
        )  # fmt: skip

    def constants(self, *others: Tensor) -> dict[str, object]:
        """Compile-time arguments common to the kernels."""
        d = self.q.shape[-1]
        return {
            "HAS_MASK": self.mask.present,
            "D": d,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "PRECISION": self.precision,
            "WIDE": is_wide(self.q, self.k, self.v, *others),
        }

    @property
    def scales(self) -> tuple[float, float]:
        """The scale, and the scale in the units of `powers`: natural for fp32, log2 else."""
        return self.scale, self.scale * (1.0 if self.q.dtype == torch.float32 else math.log2(math.e))


def make_call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, precision: str
) -> Call:
    """Bring 5-D inputs into kernel form; copies only what is not aligned."""
    key_mask = prepare_mask(mask, q)
    return Call(aligned(q), aligned(k), aligned(v), prepare_bias(bias.squeeze(1)), key_mask, scale, precision)


def launch_forward(call: Call, o: Tensor, lse: Tensor, config: Config) -> None:
    """Fill o [B, R, H, Q, D] and lse [B, R, H, Q]."""
    rows, heads, lq, lk = call.sizes
    c = config.constants
    grid = (triton.cdiv(lq, c["BQ"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    forward_kernel[grid](
        call.q, call.k, call.v, call.bias, call.mask.keep, call.mask.weights, o, lse, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(o),
        *bias_strides(call.bias), *call.mask.keep_strides(), *call.mask.weight_strides(), call.scales[1],
        **call.constants(o), FAST=call.q.dtype != torch.float16, **config.launch(),
    )  # fmt: skip


def launch_statistics(
    call: Call, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(lse in the units of `powers`, delta), fp32 [B, R, H, Q padded to TILE]; see `statistics_kernel`."""
    rows, heads, lq, _ = call.sizes
    padded = triton.cdiv(lq, TILE) * TILE
    lse2, delta = torch.empty((2, *call.q.shape[:-2], padded), dtype=torch.float32, device=call.q.device)
    d = call.q.shape[-1]
    statistics_kernel[(padded // TILE * rows * heads * call.q.shape[0],)](
        o, do, lse, lse if dlse is None else dlse, lse2, delta, rows, heads, lq, *strides8(o), *strides8(do),
        HAS_DLSE=dlse is not None, D=d, BLOCK_D=triton.next_power_of_2(d), WIDE=is_wide(o, do), BQ=TILE,
    )  # fmt: skip
    return lse2, delta


def launch_grad_kv(
    call: Call, do: Tensor, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> None:
    """Fill dk and dv [B, R, H, K, D]."""
    rows, heads, lq, lk = call.sizes
    flipped = prepare_bias(call.bias[..., :lk].transpose(-1, -2))
    c = config.constants
    grid = (triton.cdiv(lk, c["BK"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    grad_kv_kernel[grid](
        call.q, call.k, call.v, do, flipped, call.mask.keep, lse2, delta, dk, dv, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dk), *strides8(dv),
        *bias_strides(flipped), *call.mask.keep_strides(), *call.scales,
        **call.constants(do, dk, dv), **config.launch(),
    )  # fmt: skip


def launch_grad_q(call: Call, do: Tensor, lse2: Tensor, delta: Tensor, dq: Tensor, config: Config) -> None:
    """Fill dq [B, R, H, Q, D]."""
    rows, heads, lq, lk = call.sizes
    c = config.constants
    grid = (triton.cdiv(lq, c["BQ"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    grad_q_kernel[grid](
        call.q, call.k, call.v, do, call.bias, call.mask.weights, lse2, delta, dq, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dq),
        *bias_strides(call.bias), *call.mask.weight_strides(), *call.scales,
        **call.constants(do, dq), **config.launch(),
    )  # fmt: skip


def row_splits(call: Call, config: Config, programs_per_core: int) -> int:
    """Over how many programs the rows of the bias gradient are split, to fill the device."""
    rows, heads, lq, lk = call.sizes
    tiles = triton.cdiv(lq, config.constants["BQ"]) * triton.cdiv(lk, config.constants["BK"]) * heads
    return max(1, min(rows, triton.cdiv(programs_per_core * cores(call.q.device), tiles)))


def launch_grad_bias(
    call: Call, do: Tensor, lse2: Tensor, delta: Tensor, dbias: Tensor, dq: Tensor | None, plan: Plan
) -> None:
    """Fill dbias [1, H, Q, K] of one batch entry, and dq [1, R, H, Q, D] when given.

    Workspace: the fp32 planes of dbias, and for dq one plane per key tile for as many rows at a time as fit in the
    memory that dk and dv, allocated later, will take anyway.
    """
    rows, heads, lq, lk = call.sizes
    config, d = plan.grad_bias, call.q.shape[-1]
    k_tiles = triton.cdiv(lk, config.constants["BK"])
    tiles = triton.cdiv(lq, config.constants["BQ"]) * k_tiles * heads
    splits = row_splits(call, config, plan.programs_per_core)
    planes = torch.empty((splits, heads, lq, lk), dtype=torch.float32, device=call.q.device)
    part_dtype = plan.part_dtype or call.q.dtype
    chunk, parts = rows, planes
    if dq is not None:
        line_bytes = k_tiles * heads * lq * d * part_dtype.itemsize
        room = 2 * call.k.numel() * call.k.element_size()
        chunk = max(min(rows, splits), min(rows, room // line_bytes))
        parts = torch.empty((k_tiles, chunk, lq, heads, d), dtype=part_dtype, device=call.q.device)
    for start in range(0, rows, chunk):
        stop = min(rows, start + chunk)
        grad_bias_kernel[(tiles * splits,)](
            call.q, call.k, call.v, do, call.bias, call.mask.weights, lse2, delta, planes, parts, rows, heads, lq, lk,
            splits, start, stop, (stop - start) * lq * heads * d,
            *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do),
            *bias_strides(call.bias), *call.mask.weight_strides(), *call.scales,
            **call.constants(do), EMIT_DQ=dq is not None, ACCUMULATE=start > 0, **config.launch(),
        )  # fmt: skip
        if dq is not None:
            lines = (stop - start) * lq * heads
            _, dq_r, dq_h, dq_l = strides8(dq)
            fold_q_kernel[(triton.cdiv(lines, FOLD_LINES),)](
                parts, dq[:, start:], k_tiles, lines, heads, lq, dq_r, dq_h, dq_l,
                D=d, BLOCK_D=triton.next_power_of_2(d), LINES=FOLD_LINES,
            )  # fmt: skip
    size = dbias.numel()
    fold_kernel[(triton.cdiv(size, FOLD_BLOCK),)](planes, dbias, splits, size, BLOCK=FOLD_BLOCK)
