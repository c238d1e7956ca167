"""Host side of the joint backward kernel: its workspace, how rows and keys are shared out, launches."""

from functools import cache

import torch
from torch import Tensor

from optimized.ops.attention.joint import COLUMNS, joint_between_kernel, joint_kernel
from optimized.ops.attention.launch import FOLD_PLANES, FOUR_WARPS, Call, fold_programs, strides8
from optimized.ops.attention.packing import TILE
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, processors, product_width
from optimized.ops.tuning import Config

NEVER = -(2.0**20)  # exponent, in powers of two, of what must vanish whatever its bias is
WORKSPACE = 1.0  # of the bytes of q
LEAST_WORKSPACE = 24 << 20
REGISTERS = 65536  # of a multiprocessor


def applies(q: Tensor, scale: float) -> bool:
    """Whether the joint kernel takes this call. Three pieces of fp16 do not reach as far as fp32, those of fp32 are not needed."""
    return q.dtype == torch.bfloat16 and scale != 0.0


def launch_joint(
    call: Call,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor, Tensor | None],
    config: Config,
) -> None:
    """Fill dq [B, R, H, Q, D], dk, dv [B, R, H, K, D] and, where it is given, dbias, contiguous [B, 1, H, Q, K].

    o and do are aligned, lse and dlse contiguous. Rows come in chunks, see `shares`: columns, sums of dq and planes of a
    chunk are its workspace.
    """
    dq, dk, dv, dbias = gradients
    rows, heads, lq, lk = call.sizes
    batch, device = call.q.shape[0], call.q.device
    at_once, bq = config.constants["ROWS"], config.constants["BQ"]
    tiles = ceil_div(lk, config.constants["BK"])
    padded, wide = ceil_div(lq, TILE) * TILE, product_width(call.q.shape[-1])
    plane = 0 if dbias is None else padded * ceil_div(lk, TILE) * TILE
    groups, share = shares(
        ceil_div(rows, at_once), heads * batch, tiles, processors(device) * resident(config),
        2 * plane + 2 * at_once * padded * COLUMNS.value, 4 * at_once * padded * wide, max(int(WORKSPACE * 2 * call.q.numel()), LEAST_WORKSPACE),
    )  # fmt: skip
    splits = ceil_div(tiles, share)
    room = groups * at_once
    columns = torch.empty((batch, room, heads, padded, COLUMNS.value), dtype=call.q.dtype, device=device)
    parts = torch.empty((splits, batch, room, heads, padded, wide), dtype=torch.float32, device=device)
    planes = total = out = call.q  # stand for nothing
    folds = 0
    if dbias is not None:
        planes = torch.empty((batch, groups, heads, plane), dtype=call.q.dtype, device=device)
        total = out = dbias
        folds = fold_programs(lk, lq) * heads * batch
        if room < rows and dbias.dtype != torch.float32:
            total = torch.empty(dbias.shape, dtype=torch.float32, device=device)
    d = call.q.shape[-1]
    never = NEVER / call.unit_scale
    strides = (
        *strides8(call.q),
        *strides8(call.k),
        *strides8(call.v),
        *strides8(do),
        *strides8(dk),
        *strides8(dv),
    )
    sizes = {n: v for n, v in call.constants.items() if n != "PRECISION"} | {"WITH_PLANES": dbias is not None}
    between = {
        "HAS_DLSE": dlse is not None, "D": d, "BLOCK_D": wide, "TILE": TILE, "ROWS": at_once, "BQ": bq, **FOLD_PLANES,
    }  # fmt: skip
    for start in range(-room, rows, room):
        some = min(groups, ceil_div(rows - start, at_once))
        real = min(some * at_once, rows - start)
        last = start + room >= rows
        if start >= 0:
            arguments = (
                call.q, call.k, call.v, do, call.flipped, call.mask, columns, parts, dk, dv, planes, *call.sizes,
                batch, start, some, share, splits, *strides, *call.mask_strides, call.scale, call.unit_scale, never,
            )  # fmt: skip
            launch(joint_kernel, (some * heads * batch * splits, 1, 1), config, arguments, **sizes)
        sums = ceil_div(lq, bq) * heads * real * batch if start >= 0 else 0
        next_rows = 0 if last else min(groups, ceil_div(rows - start - room, at_once)) * at_once
        ahead = padded // TILE * next_rows * heads * batch
        arguments = (
            o, do, lse, lse if dlse is None else dlse, columns, parts, dq, planes, total, out if last else total,
            rows, heads, lq, lk, batch, start, real, some, splits, next_rows, sums, folds if start >= 0 else 0,
            *strides8(o), *strides8(do), *strides8(dq), call.scale, call.unit_scale, never,
        )  # fmt: skip
        grid = (sums + (folds if start >= 0 else 0) + ahead, 1, 1)
        launch(joint_between_kernel, grid, FOUR_WARPS, arguments, **between)


def resident(config: Config) -> int:
    """Programs that a multiprocessor's registers hold, where the compiler takes as many as it may."""
    return max(1, REGISTERS // (32 * config.num_warps * (config.max_registers or 256)))


@cache
def shares(
    groups: int, lines: int, tiles: int, slots: int, group_bytes: int, sum_bytes: int, limit: int
) -> tuple[int, int]:
    """(groups of rows in a chunk, key tiles of a program) that should take the least time within `limit` bytes.

    `lines` programs take each group, or as many times that as the key tiles are split; `slots` programs run at a time. A
    group takes `group_bytes` of each line, and `sum_bytes` for each split. Time is counted in key tiles of a program: a
    wave of programs takes its share of tiles, a chunk about one more to begin and to end, and writing and reading the sums
    of a program, against HBM, a quarter. All chunks are about equally large.
    """
    best: tuple[float, int, int] | None = None
    for share in range(tiles, 0, -1):
        splits = ceil_div(tiles, share)
        if ceil_div(tiles, splits) != share:
            continue  # as many splits as a smaller share, and unequal ones
        most = max(1, min(groups, limit // (lines * (group_bytes + splits * sum_bytes))))
        for some in range(1, most + 1):
            chunks = ceil_div(groups, some)
            waves = ceil_div(ceil_div(groups, chunks) * lines * splits, slots)
            time = chunks * (waves * share + 1) + 0.25 * groups * lines * splits / slots
            if best is None or time < best[0]:
                best = time, ceil_div(groups, chunks), share
    assert best is not None
    return best[1], best[2]
