"""Host side of the attention kernels: layouts, workspaces, grids and launch configurations."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from optimized.ops.attention.backward import (
    delta_kernel,
    fold_kernel,
    fold_q_kernel,
    grad_bias_kernel,
    grad_kv_kernel,
    grad_q_kernel,
)
from optimized.ops.attention.forward import forward_kernel
from optimized.ops.tuning import Config, device_name, lookup

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


def default_plan(dtype: torch.dtype, head_dim: int, hip: bool) -> Plan:
    """Configurations that run everywhere; measured ones replace them through the tuning files."""
    if dtype == torch.float32:
        tile = Config({"BQ": 32, "BK": 32, "STAGES": 1}, 4)
        return Plan(_small(1, 32, 32), _small(1, 32, 32), tile, _small(1, 32, 32))
    if hip:
        tile = Config({"BQ": 64, "BK": 64, "STAGES": 1}, 4)
        return Plan(_small(2, 64, 64), _small(1, 64, 64), tile, _small(1, 64, 64))
    wide = head_dim > 32
    forward = Config({"ROWS": 1 if wide else 2, "BQ": 128, "BK": 64, "STAGES": 2}, 8)
    grad_kv = Config({"ROWS": 1, "BQ": 64, "BK": 128, "STAGES": 2}, 8)
    grad_bias = Config({"BQ": 64 if wide else 128, "BK": 64, "STAGES": 2}, 4 if wide else 8)
    grad_q = Config({"ROWS": 1 if wide else 2, "BQ": 128, "BK": 64, "STAGES": 2}, 8)
    return Plan(forward, grad_kv, grad_bias, grad_q)


def plan_for(q: Tensor) -> Plan:
    """The plan for these inputs: measured on this device, shipped for it, or the default."""
    base = default_plan(q.dtype, q.shape[-1], torch.version.hip is not None)
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
    fits = x.stride(-1) == 1 and all(s % 8 == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()


def strides8(x: Tensor) -> list[int]:
    """Batch, row, head and token strides in units of 8 elements; 0 along axes of size 1."""
    return [s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset along the token axis of any tensor can exceed 31 bits."""
    return any((t.shape[-2] + 256) * t.stride(-2) >= 2**31 for t in tensors)


def prepare_bias(bias: Tensor) -> tuple[Tensor, bool]:
    """(bias [B, H, Q, K] that the kernels can read in wide loads, whether its contiguous axis is the query axis).

    Wide loads need both lengths and the row pitch to be multiples of 8; other biases are copied into a padded buffer
    (no larger than one row's scores, 1/R of the work).
    """
    x = bias.squeeze(-4)
    transposed = x.stride(-2) == 1 and x.stride(-1) != 1 and x.shape[-1] > 1
    y = x.transpose(-1, -2) if transposed else x
    even = x.shape[-1] % 8 == 0 and x.shape[-2] % 8 == 0
    fits = y.stride(-1) == 1 and all(s % 8 == 0 for s, n in zip(y.stride()[:-1], y.shape[:-1], strict=True) if n > 1)
    if even and fits and x.data_ptr() % 16 == 0:
        return x, transposed
    rows, columns = y.shape[-2], y.shape[-1]
    padded = torch.nn.functional.pad(y, (0, -columns % 8, 0, -rows % 8)).contiguous()
    return (padded.transpose(-1, -2) if transposed else padded), transposed


def bias_arguments(x: Tensor, transposed: bool) -> list[int]:
    """Batch, head and row-pitch strides of a prepared bias in units of 8 elements."""
    pitch = x.stride(-1) if transposed else x.stride(-2)
    return [x.stride(0) // 8 if x.shape[0] > 1 else 0, x.stride(1) // 8 if x.shape[1] > 1 else 0, pitch // 8]


@dataclass(frozen=True)
class KeyMask:
    """The key mask as the kernels read it: bytes with unit stride along keys, and fp32 weights padded to 8 keys."""

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
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[-1] % 8)) if keep.shape[-1] % 8 else keep
    return KeyMask(True, keep, padded.to(torch.float32, memory_format=torch.contiguous_format))


@dataclass(frozen=True)
class Call:
    """Inputs in kernel form: q, k, v [B, R, H, L, D] aligned, bias [B, H, Q, K] padded, mask as bytes."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    transposed: bool
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
            self.q[part], self.k[part], self.v[part], self.bias[part], self.transposed, self.mask.entry(b),
            self.scale, self.precision,
        )  # fmt: skip

    def constants(self, *others: Tensor) -> dict[str, object]:
        """Compile-time arguments common to the kernels."""
        d = self.q.shape[-1]
        return {
            "HAS_MASK": self.mask.present,
            "TRANSPOSED": self.transposed,
            "D": d,
            "BLOCK_D": max(16, triton.next_power_of_2(d)),
            "PRECISION": self.precision,
            "WIDE": is_wide(self.q, self.k, self.v, self.bias, *others),
        }

    @property
    def scales(self) -> tuple[float, float]:
        """The scale, and the scale in log2 units."""
        return self.scale, self.scale * math.log2(math.e)


def make_call(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, precision: str
) -> Call:
    """Bring 5-D inputs into kernel form; copies only what is not aligned."""
    prepared, transposed = prepare_bias(bias)
    key_mask = prepare_mask(mask, q)
    return Call(aligned(q), aligned(k), aligned(v), prepared, transposed, key_mask, scale, precision)


def launch_forward(call: Call, o: Tensor, lse: Tensor, config: Config) -> None:
    """Fill o [B, R, H, Q, D] and lse [B, R, H, Q]."""
    rows, heads, lq, lk = call.sizes
    c = config.constants
    grid = (triton.cdiv(lq, c["BQ"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    forward_kernel[grid](
        call.q, call.k, call.v, call.bias, call.mask.keep, call.mask.weights, o, lse, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(o),
        *bias_arguments(call.bias, call.transposed), *call.mask.keep_strides(), *call.mask.weight_strides(), call.scales[1],
        **call.constants(o), FAST=call.q.dtype != torch.float16, **config.launch(),
    )  # fmt: skip


def launch_delta(call: Call, o: Tensor, do: Tensor) -> Tensor:
    """delta [B, R, H, Q] = sum over d of o * do, fp32."""
    rows, heads, lq, _ = call.sizes
    delta = torch.empty(call.q.shape[:-1], dtype=torch.float32, device=call.q.device)
    block = 128
    d = call.q.shape[-1]
    grid = (triton.cdiv(lq, block) * rows * heads * call.q.shape[0],)
    delta_kernel[grid](
        o, do, delta, rows, heads, lq, *strides8(o), *strides8(do),
        D=d, BLOCK_D=max(16, triton.next_power_of_2(d)), WIDE=is_wide(o, do), BQ=block,
    )  # fmt: skip
    return delta


def launch_grad_kv(
    call: Call, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> None:
    """Fill dk and dv [B, R, H, K, D]."""
    rows, heads, lq, lk = call.sizes
    c = config.constants
    grid = (triton.cdiv(lk, c["BK"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    grad_kv_kernel[grid](
        call.q, call.k, call.v, do, call.bias, call.mask.keep, lse, delta, dk, dv, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dk), *strides8(dv),
        *bias_arguments(call.bias, call.transposed), *call.mask.keep_strides(), *call.scales,
        **call.constants(do, dk, dv), **config.launch(),
    )  # fmt: skip


def launch_grad_q(call: Call, do: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, config: Config) -> None:
    """Fill dq [B, R, H, Q, D]."""
    rows, heads, lq, lk = call.sizes
    c = config.constants
    grid = (triton.cdiv(lq, c["BQ"]) * triton.cdiv(rows, c["ROWS"]) * heads * call.q.shape[0],)
    grad_q_kernel[grid](
        call.q, call.k, call.v, do, call.bias, call.mask.weights, lse, delta, dq, rows, heads, lq, lk,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dq),
        *bias_arguments(call.bias, call.transposed), *call.mask.weight_strides(), *call.scales,
        **call.constants(do, dq), **config.launch(),
    )  # fmt: skip


def row_splits(call: Call, config: Config, programs_per_core: int) -> int:
    """Over how many programs the rows of the bias gradient are split, to fill the device."""
    rows, heads, lq, lk = call.sizes
    tiles = triton.cdiv(lq, config.constants["BQ"]) * triton.cdiv(lk, config.constants["BK"]) * heads
    return max(1, min(rows, triton.cdiv(programs_per_core * cores(call.q.device), tiles)))


def launch_grad_bias(
    call: Call, do: Tensor, lse: Tensor, delta: Tensor, dbias: Tensor, dq: Tensor | None, plan: Plan
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
            call.q, call.k, call.v, do, call.bias, call.mask.weights, lse, delta, planes, parts, rows, heads, lq, lk,
            splits, start, stop, (stop - start) * lq * heads * d,
            *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do),
            *bias_arguments(call.bias, call.transposed), *call.mask.weight_strides(), *call.scales,
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
