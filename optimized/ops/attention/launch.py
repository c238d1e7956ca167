"""Host side of the attention kernels: layouts, workspaces, grids and launch configurations."""

import math
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from optimized.ops.attention.backward import (
    grad_bias_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    statistics_kernel,
)
from optimized.ops.attention.folding import fold_kernel, fold_planes_kernel
from optimized.ops.attention.forward import forward_kernel
from optimized.ops.attention.packing import PACK, TILE, prepare_kernel
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, power_of_two, processors, product_width
from optimized.ops.tuning import Config, architecture, device_name, forget_with, lookup

FOLD_BLOCK = 1024
MASK_KEYS = 1024
# Over how many programs the bias gradient splits its rows; with 4 a core it was 18 % slower on an H200 at 768.
PROGRAMS_PER_CORE = 8
# A bias of more than this part of k is large: what is made of it is a good part of what the backward pass holds, and the
# pass spares it. It packs one form of the bias when it is done with the other (of a smaller one, a second launch costs
# more than the place is worth), counts the fp32 sum of planes of dbias among them, and lets fewer programs fill the device.
LARGE_BIAS = 1 / 8
# Values that planes of dbias may take in any case: 72 MiB in 16 bits, for which the host need not launch more chunks.
FEW_PLANES = 36 << 20
FOLD_PLANES = {
    "BK": 64,
    "TOGETHER": 4,
}  # 2 KiB of a plane a program; four planes in flight hide the memory's latency
MOST_ROWS = 4  # a program of any configuration has
FOUR_WARPS = Config()  # of the kernels that have nothing to choose
FARTHEST = 2**31 // TILE  # token stride, in elements, up to which offsets inside a tile fit 32 bits


@dataclass(frozen=True)
class Plan:
    """Launch configurations of one call. Without one for `grad_bias`, the kernel of dq writes planes of dbias."""

    forward: Config
    grad_kv: Config
    grad_bias: Config | None
    grad_q: Config

    def for_rows(self, rows: int) -> "Plan":
        """The same with no more rows a program than there are: it would repeat the last (the single representation has one)."""
        forward, grad_kv, grad_q = (_at_most(c, rows) for c in (self.forward, self.grad_kv, self.grad_q))
        return Plan(forward, grad_kv, self.grad_bias, grad_q)


def _at_most(config: Config, rows: int) -> Config:
    """At least one row a program is not ahead: see `forward`."""
    constants = {**config.constants, "ROWS": min(config.constants["ROWS"], rows)}
    if "AHEAD" in constants:
        constants["AHEAD"] = min(constants["AHEAD"], constants["ROWS"] - 1)
    return replace(config, constants=constants)


def _rows(rows: int, bq: int, bk: int, stages: int = 2, cap: int = 0, ahead: int = 0) -> Config:
    early = {"AHEAD": ahead} if ahead else {}
    return Config({"ROWS": rows, "BQ": bq, "BK": bk, "STAGES": stages, **early}, max_registers=cap)


def _tile(bq: int, bk: int, stages: int = 2, cap: int = 0) -> Config:
    return Config({"BQ": bq, "BK": bk, "STAGES": stages}, max_registers=cap)


def default_plan(dtype: torch.dtype, head_dim: int, arch: str, precision: str = "ieee") -> Plan:
    """Configurations that run everywhere; of 16 bits on sm_90 the fastest of some 180 on an H200 at 384 and 768 tokens.

    In the forward kernel four programs of 128 registers a multiprocessor beat fewer, larger ones there. The backward
    kernels do better without such a limit, with 64 queries a step or three rows: 2 to 13 % at 768 and 1024 tokens, and
    no less at 384. Loads two steps ahead are worth a tenth to a fifth.
    """
    wide = head_dim > 32
    if dtype == torch.float32:
        return _full_plan(wide, arch, precision)
    if arch != "sm_90":
        fewer = dtype == torch.float16 and arch.startswith("gfx")
        return Plan(
            _rows(1, 32 if fewer else 64, 64),
            _rows(1, 64, 32 if wide else 64),
            _tile(32 if wide else 64, 64, stages=1),
            _rows(1, 64, 64),
        )
    if wide:
        return Plan(_rows(1, 64, 32, 3), _rows(1, 64, 64, 3), None, _rows(2, 64, 32, 4))
    return Plan(
        _rows(2, 64, 32, 3, cap=128, ahead=1),
        _rows(1, 64, 64, 3, cap=168),
        None,
        _rows(3, 64, 32, 3),
    )


def _full_plan(wide: bool, arch: str, precision: str) -> Plan:
    """Of fp32. As three TF32 products on sm_90 the fastest of 18 on an H200, 4 samples of 768 tokens with 48 channels a head;
    elsewhere, where nothing was timed, the tiles that issue the fewest instructions a score without many spills."""
    if precision == "ieee":
        forward = _rows(1, 32, 16 if wide else 32)
        return Plan(forward, _rows(1, 32, 32), _tile(32, 32, stages=1), _rows(1, 32, 32))
    if arch == "sm_90":
        rows = _rows(1, 64, 32, 1)
        return Plan(rows, _rows(1, 32, 64), _tile(64, 32), rows)
    return Plan(_rows(1, 32, 32), _rows(1, 32, 32), _tile(32, 16, stages=1), _rows(1, 32, 32))


def plan_for(q: Tensor, precision: str) -> Plan:
    """The plan for these inputs: measured on this device, shipped for it, or the default."""
    if device_name(q.device) == "cpu":
        row = _rows(2, 16, 32, stages=1)
        plan = Plan(row, row, _tile(16, 32, stages=1) if q.dtype == torch.float32 else None, row)
        return plan.for_rows(q.shape[-4])
    rows = min(q.shape[-4], MOST_ROWS)
    return _measured_plan(q.dtype, q.shape[-1], length_bucket(q.shape[-2]), rows, q.device, precision)


@cache
def _measured_plan(
    dtype: torch.dtype, head_dim: int, length: str, rows: int, device: torch.device, precision: str
) -> Plan:
    base = default_plan(dtype, head_dim, architecture(device), precision)
    kind = str(dtype).removeprefix("torch.")
    key = (kind if precision == "ieee" else f"{kind}-{precision}", head_dim, length)
    plan = Plan(
        lookup("attention.forward", key, device, base.forward),
        lookup("attention.grad_kv", key, device, base.grad_kv),
        base.grad_bias and lookup("attention.grad_bias", key, device, base.grad_bias),
        lookup("attention.grad_q", key, device, base.grad_q),
    )
    return plan.for_rows(rows)


forget_with(_measured_plan.cache_clear)


def length_bucket(length: int) -> str:
    """Tuning key for a length: short, medium or long."""
    return "short" if length <= 128 else "medium" if length <= 512 else "long"


def aligned(x: Tensor) -> Tensor:
    """`x` itself when its last axis is contiguous and rows start at multiples of 8 elements, else a copy.

    Also a copy where tokens lie so far apart that offsets inside a tile would not fit 32 bits.
    """
    *outer, last = x.stride()
    fits = last == 1 and outer[-1] < FARTHEST and x.data_ptr() % 16 == 0
    if fits and all(s % 8 == 0 for s, n in zip(outer, x.shape, strict=False) if n > 1):
        return x
    return x.contiguous()


def strides8(x: Tensor) -> list[int]:
    """Batch, row, head and token strides in units of 8 elements; 0 along axes of size 1."""
    return [s // 8 if n > 1 else 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)]


def vector_width(bias: Tensor) -> int:
    """Values of a packed bias in one 16-byte load."""
    return 4 if bias.dtype == torch.float32 else 8


@dataclass(frozen=True)
class Call:
    """Inputs in kernel form: q, k, v [B, R, H, L, D] aligned; the bias as it came [B, 1, H, Q, K] and packed, [q, k]
    and [k, q]; the additive mask [B, R, K padded to TILE] fp32; for the backward pass also its bits
    [B, R, K padded to TILE / 16] int16. In place of what there is not stands q."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: Tensor
    bias: Tensor
    flipped: Tensor
    mask: Tensor
    bits: Tensor
    scale: float
    precision: str

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, heads, queries, keys."""
        return self.q.shape[1], self.q.shape[2], self.q.shape[3], self.k.shape[3]

    @property
    def large_bias(self) -> bool:
        """Whether what is made of the bias takes a good part of the pass's memory."""
        return self.source.numel() > LARGE_BIAS * self.k.numel()

    @property
    def has_mask(self) -> bool:
        """Whether some keys may be masked."""
        return self.mask is not self.q

    @property
    def mask_strides(self) -> tuple[int, int]:
        """Batch and row strides of the mask in units of 8."""
        return (self.mask.stride(0) // 8, self.mask.stride(1) // 8) if self.has_mask else (0, 0)

    @cached_property
    def constants(self) -> dict[str, int | bool | str]:
        """Compile-time arguments common to the kernels."""
        d = self.q.shape[-1]
        return {
            "HAS_MASK": self.has_mask,
            "D": d,
            "BLOCK_D": product_width(d),
            "TILE": TILE,
            "PRECISION": self.precision,
        }

    @property
    def unit_scale(self) -> float:
        """The scale in the units of `powers`: natural for fp32, log2 else."""
        return self.scale * (1.0 if self.q.dtype == torch.float32 else math.log2(math.e))


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    scale: float,
    precision: str,
    backward: bool,
) -> Call:
    """Bring 5-D inputs into kernel form, in one launch; q, k and v are copied only if not aligned.

    For the backward pass the bias is packed both ways, if it is small: else `turned` packs the second.
    """
    q, k, v = aligned(q), aligned(k), aligned(v)
    batch, rows, _, _, _ = q.shape
    padded = ceil_div(k.shape[3], TILE) * TILE
    packed = _packed_like(bias)
    additive, bits = q, q
    if mask is not None:
        additive = torch.empty((batch, rows, padded), dtype=torch.float32, device=q.device)
        if backward:
            bits = torch.empty((batch, rows, padded // 16), dtype=torch.int16, device=q.device)
    call = Call(q, k, v, bias, packed, q, additive, bits, scale, precision)
    both = backward and not call.large_bias
    if both:
        call = replace(call, flipped=_packed_like(bias))
    _prepare(call, mask, straight=True, flipped=both)
    return call


def turned(call: Call) -> Call:
    """The call as the kernel of dk and dv wants it, which is the last to read a bias: packed [k, q], no longer [q, k]."""
    if call.flipped is call.q:
        call = replace(call, flipped=_packed_like(call.source))
        _prepare(call, None, straight=False, flipped=True)
    return replace(call, bias=call.q)


def _packed_like(bias: Tensor) -> Tensor:
    """Room for a packed bias."""
    batch, _, heads, lq, lk = bias.shape
    size = ceil_div(lq, TILE) * ceil_div(lk, TILE) * TILE * TILE
    return torch.empty((batch, heads, size), dtype=bias.dtype, device=bias.device)


def _prepare(call: Call, mask: Tensor | None, *, straight: bool, flipped: bool) -> None:
    """Pack the bias, and write what is made of the mask where there is one."""
    rows, heads, lq, lk = call.sizes
    batch, bias = call.q.shape[0], call.source
    padded_q, padded_k = ceil_div(lq, TILE) * TILE, ceil_div(lk, TILE) * TILE
    packs = batch * heads * (padded_q // PACK) * (padded_k // PACK)
    lines = 0 if mask is None else batch * rows * ceil_div(padded_k, MASK_KEYS)
    keep = call.q if mask is None else mask.view(torch.uint8)
    arguments = (
        bias, call.bias, call.flipped, keep, call.mask, call.bits, lq, lk, heads,
        bias.stride(0), bias.stride(2), bias.stride(3), bias.stride(4), packs, rows,
        *((0, 0, 0) if mask is None else keep.stride()),
    )  # fmt: skip
    launch(
        prepare_kernel, (packs + lines, 1, 1), FOUR_WARPS, arguments,
        STRAIGHT=straight, TURNED=flipped, HAS_MASK=mask is not None, HAS_BITS=mask is not None and call.bits is not call.q,
        TILE=TILE, P=PACK, VECTOR=vector_width(bias), KEYS=MASK_KEYS,
    )  # fmt: skip


def programs(call: Call, length: int, tile: int, config: Config) -> tuple[int, int, int]:
    """Grid of the kernels that own a tile of `length` tokens of ROWS rows."""
    rows, heads, _, _ = call.sizes
    groups = ceil_div(rows, config.constants["ROWS"])
    return ceil_div(length, tile) * groups * heads * call.q.shape[0], 1, 1


def launch_forward(call: Call, o: Tensor, lse: Tensor, config: Config) -> None:
    """Fill o [B, R, H, Q, D] and lse [1, B, R, H, Q], in fp32 [2, B, R, H, Q] with its rounding."""
    arguments = (
        call.q, call.k, call.v, call.bias, call.mask, o, lse, *call.sizes,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(o), *call.mask_strides, call.unit_scale,
    )  # fmt: skip
    grid = programs(call, call.sizes[2], config.constants["BQ"], config)
    fast = call.q.dtype != torch.float16
    launch(
        forward_kernel,
        grid,
        config,
        arguments,
        **call.constants,
        **({} if "AHEAD" in config.constants else {"AHEAD": 0}),
        FAST=fast,
    )


def launch_statistics(
    call: Call, o: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(-lse in the units of `powers`, delta), fp32 [B, R, H, Q padded to TILE]; see `statistics_kernel`."""
    rows, heads, lq, _ = call.sizes
    padded = ceil_div(lq, TILE) * TILE
    lse2, delta = torch.empty((2, *call.q.shape[:-2], padded), dtype=torch.float32, device=call.q.device)
    d = call.q.shape[-1]
    arguments = (
        o, do, lse, lse if dlse is None else dlse, lse2, delta, rows, heads, lq, *strides8(o), *strides8(do),
    )  # fmt: skip
    grid = (padded // TILE * rows * heads * call.q.shape[0], 1, 1)
    sizes = {"HAS_DLSE": dlse is not None, "D": d, "BLOCK_D": power_of_two(d), "TILE": TILE}
    launch(statistics_kernel, grid, FOUR_WARPS, arguments, **sizes)
    return lse2, delta


def launch_grad_kv(
    call: Call, do: Tensor, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> None:
    """Fill dk and dv [B, R, H, K, D], of a call that was `turned`."""
    arguments = (
        call.q, call.k, call.v, do, call.flipped, call.mask, lse2, delta, dk, dv, *call.sizes,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dk), *strides8(dv),
        *call.mask_strides, call.scale, call.unit_scale,
    )  # fmt: skip
    grid = programs(call, call.sizes[3], config.constants["BK"], config)
    launch(grad_kv_kernel, grid, config, arguments, **call.constants)


def launch_grad_q(
    call: Call,
    do: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dq: Tensor,
    config: Config,
    dbias: Tensor | None = None,
    spent: bool = False,
) -> None:
    """Fill dq [B, R, H, Q, D] and, where given, dbias, contiguous [B, 1, H, Q, K].

    Workspace for dbias: its planes, see `plane_groups`, and, where they come in several chunks and dbias has 16 bits,
    one in fp32.
    """
    rows, heads, lq, lk = call.sizes
    batch, tile = call.q.shape[0], config.constants["ROWS"]
    groups = ceil_div(rows, tile)
    planes = total = call.q  # stand for nothing
    if dbias is not None:
        groups = plane_groups(call, config, dbias, spent)
        size = ceil_div(lq, TILE) * ceil_div(lk, TILE) * TILE * TILE
        planes = torch.empty((batch, groups, heads, size), dtype=call.q.dtype, device=call.q.device)
        total = dbias
        if groups * tile < rows and dbias.dtype != torch.float32:
            total = torch.empty(dbias.shape, dtype=torch.float32, device=call.q.device)
    programs_a_group = ceil_div(lq, config.constants["BQ"]) * heads * batch
    constants = {**call.constants, "SUMS": dbias is not None}
    for start in range(0, rows, groups * tile):
        some = min(groups, ceil_div(rows - start, tile))
        arguments = (
            call.q, call.k, call.v, do, call.bias, call.bits, lse2, delta, dq, planes, *call.sizes, start, some,
            *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *strides8(dq),
            call.scale, call.unit_scale,
        )  # fmt: skip
        grid = (programs_a_group * some, 1, 1)
        launch(grad_q_kernel, grid, config, arguments, **constants)
        if dbias is not None:
            out = dbias if start + groups * tile >= rows else total
            grid = (ceil_div(lq, 16) * ceil_div(lk, FOLD_PLANES["BK"]) * heads * batch, 1, 1)
            launch(
                fold_planes_kernel, grid, FOUR_WARPS, (planes, total, out, heads, lq, lk, some),
                CONTINUES=start > 0, TILE=TILE, **FOLD_PLANES,
            )  # fmt: skip


def plane_groups(call: Call, config: Config, dbias: Tensor, spent: bool) -> int:
    """Groups of ROWS rows whose planes of dbias are held at a time; all chunks are about equally large.

    As many as hold no more than dk and dv, which take their place later; where those are written over k and v (`spent`)
    nothing does, and it is as many as hold no more than k. But enough to fill the device, and FEW_PLANES.
    """
    rows, heads, lq, lk = call.sizes
    groups = ceil_div(rows, config.constants["ROWS"])
    plane = call.q.shape[0] * heads * ceil_div(lq, TILE) * ceil_div(lk, TILE) * TILE * TILE
    room, a_core = (1 if spent else 2) * call.k.numel(), PROGRAMS_PER_CORE
    if call.large_bias:
        room -= 0 if dbias.dtype == torch.float32 else 2 * dbias.numel()
        a_core //= 2
    else:
        room = max(room, FEW_PLANES)
    filling = ceil_div(
        a_core * processors(call.q.device),
        ceil_div(lq, config.constants["BQ"]) * heads * call.q.shape[0],
    )
    chunks = ceil_div(groups, max(1, room // plane, filling))
    return ceil_div(groups, chunks)


def launch_grad_bias(
    call: Call, do: Tensor, lse2: Tensor, delta: Tensor, dbias: Tensor, config: Config
) -> None:
    """Fill dbias, contiguous [B, 1, H, Q, K]; workspace: its fp32 planes, one for each share of the rows."""
    rows, heads, lq, lk = call.sizes
    c, batch = config.constants, call.q.shape[0]
    tiles = ceil_div(lq, c["BQ"]) * ceil_div(lk, c["BK"]) * heads * batch
    splits = max(1, min(rows, ceil_div(PROGRAMS_PER_CORE * processors(call.q.device), tiles)))
    alone = splits == 1 and dbias.dtype == torch.float32
    planes = dbias
    if not alone:
        planes = torch.empty((splits, *dbias.shape), dtype=torch.float32, device=call.q.device)
    arguments = (
        call.q, call.k, call.v, do, call.bias, call.mask, lse2, delta, planes, rows, heads, lq, lk, splits, batch,
        *strides8(call.q), *strides8(call.k), *strides8(call.v), *strides8(do), *call.mask_strides, call.unit_scale,
    )  # fmt: skip
    launch(grad_bias_kernel, (tiles * splits, 1, 1), config, arguments, **call.constants)
    if not alone:
        size = dbias.numel()
        grid = (ceil_div(size, FOLD_BLOCK), 1, 1)
        launch(fold_kernel, grid, FOUR_WARPS, (planes, dbias, splits, size), BLOCK=FOLD_BLOCK)
