"""One GPU call for attention's kernels in Gluon, beside the package's.

python bench/hopper_attention_lab.py --out DIR      (a minute on one Hopper card)

The forward pass (`gluon_attention`, `gluon_forward`) and the gradients (`gluon_gradients`), with operands in shared memory instead of
registers. Compiled for sm_90 by Triton 3.6, and not run yet.
"""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attention_lab
import torch
from gluon_attention import attention_kernel
from gluon_forward import forward_kernel
from gluon_gradients import grad_kv_kernel, grad_q_kernel
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.attention import launch as attention
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div

LENGTHS = (101, 384, 450, 768, 1024)
HEADS, HEAD = 4, 32


def attention_forward(n: int) -> Iterator[dict[str, object]]:
    """The package's kernel and Gluon's with 128 registers and without a limit, keys masked or not; N a multiple of 64."""
    made = attention_lab.Problem.make((n, HEADS, n, HEAD))
    beyond = torch.zeros((n, n, 16), dtype=torch.bfloat16, device="cuda")
    beyond[..., 0].masked_fill_(~made.mask[0], -1e30)
    o, found = torch.empty_like(made.q), torch.empty_like(made.q)
    lse = torch.empty((2, *made.q.shape[:-1]), device="cuda")
    forward = attention.plan_for(made.q, "ieee").forward
    for masked in (False, True):
        mask = made.mask if masked else None
        call = attention.make_call(made.q, made.k, made.v, made.bias, mask, HEAD**-0.5, "ieee", True)
        package = partial(attention.launch_forward, call, o, lse, forward)
        package()
        pairs = call.bias.view(torch.int32)
        arguments = (call.q, call.k, call.v, pairs, beyond, found, lse[1], n, n, call.unit_scale)
        theirs = do_bench(package, warmup=10, rep=40, return_mode="median")
        for stages, sums, registers in (
            (3, False, 128),
            (4, False, 128),
            (4, True, 128),
            (4, False, 0),
            (4, True, 0),
        ):
            constants = {"H": HEADS, "BK": 32, "D": HEAD, "STAGES": stages, "MASKED": masked, "SUMS": sums}
            cap = {"maxnreg": registers} if registers else {}
            run = partial(
                attention_kernel[(n // 64 * (n // 2) * HEADS,)], *arguments, **constants, num_warps=4, **cap
            )
            run()
            distance = ((found.float() - o.float()).norm() / o.float().norm()).item()
            of_lse = (lse[1] - lse[0]).abs().max().item()
            ms = do_bench(run, warmup=10, rep=40, return_mode="median")
            row = {"n": n, "attention": (stages, sums, registers), "masked": masked, "distance": distance}
            yield row | {"lse": of_lse, "package": theirs, "ms": ms}


def in_three(x: Tensor) -> list[Tensor]:
    """x in fp32 as three numbers in bf16, whose sum has 24 bits of it."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    return [high, middle, x - high - middle]


def attention_gradients(n: int) -> Iterator[dict[str, object]]:
    """Gradients of keys and values, then of queries and bias, no key masked; N a multiple of 128."""
    made = attention_lab.Problem.make((n, HEADS, n, HEAD))
    call = attention.make_call(made.q, made.k, made.v, made.bias, None, HEAD**-0.5, "ieee", True)
    plan = attention.plan_for(made.q, "ieee")
    o, lse = torch.empty_like(made.q), torch.empty((2, *made.q.shape[:-1]), device="cuda")
    attention.launch_forward(call, o, lse, plan.forward)
    lse2, delta = attention.launch_statistics(call, o, made.do, lse[0], None)
    over_scale, sums = -lse[0] / call.scale, (o.float() * made.do.float()).sum(-1)
    beside = torch.zeros((n, HEADS, n, 16), dtype=torch.bfloat16, device="cuda")
    for column, part in enumerate((*in_three(over_scale[0]), *in_three(-sums[0]))):
        beside[..., column] = part.view(n, HEADS, n)
    turned = attention.turned(call)
    # dk and dv, each `[1, rows, heads, n, d]` as q lies.
    theirs, found = (made.q.new_empty((2, 1, n, n, HEADS, HEAD)).transpose(3, 4) for _ in range(2))
    tensors = (turned, made.do, lse2, delta, theirs[0], theirs[1], plan.grad_kv)
    arguments = (call.q, call.k, call.v, made.do, turned.flipped.view(torch.int32), beside, *found)
    arguments = (*arguments, n, n, call.scale, call.unit_scale)
    run = grad_kv_kernel[(n // 64 * n * HEADS,)]
    others = {
        name: (partial(run, *arguments, **constants), found) for name, constants in KEYS_AND_VALUES.items()
    }
    package = partial(attention.launch_grad_kv, *tensors)
    yield from compared(n, "keys and values", package, theirs, others)
    if n % 3 == 0:
        yield from queries(n, made, call, plan, (lse2, delta, over_scale, sums))


KEYS_AND_VALUES = {
    f"{stages} stages, {turn} a turn, {cap} registers": {
        "H": HEADS, "BQ": 32, "D": HEAD, "STAGES": stages, "TURN": turn, "num_warps": 4, "maxnreg": cap,
    }
    for stages, turn, cap in ((3, 2, 128), (4, 2, 128), (4, 4, 168))
}  # fmt: skip


def queries(
    n: int,
    made: attention_lab.Problem,
    call: attention.Call,
    plan: attention.Plan,
    statistics: tuple[Tensor, ...],
) -> Iterator[dict[str, object]]:
    """Gradients of queries and bias from the same launches, chunk by chunk of rows."""
    lse2, delta, over_scale, sums = statistics
    beyond = torch.zeros((n, n, 16), dtype=torch.bfloat16, device="cuda")
    beyond[..., :3] = 1.0
    theirs, dbias = torch.empty_like(made.q), torch.empty_like(made.bias)
    found, of_bias = torch.empty_like(made.q), torch.empty_like(made.bias)
    tile = attention.TILE
    size = ceil_div(n, tile) ** 2 * tile * tile
    pairs = call.bias.view(torch.int32)

    def ours() -> None:
        groups = attention.plane_groups(call, plan.grad_q, of_bias, False)
        planes = torch.empty((groups, HEADS, size), dtype=torch.bfloat16, device="cuda")
        total = torch.empty(of_bias.shape, dtype=torch.float32, device="cuda")
        tensors = (call.q, call.k, call.v, made.do, pairs, beyond, over_scale, sums, found, planes)
        constants = {"H": HEADS, "ROWS": 3, "BK": 32, "D": HEAD, "STAGES": 3}
        for start in range(0, n, groups * 3):
            some = min(groups, (n - start) // 3)
            sizes = (n, n, start, some, call.scale, call.unit_scale)
            grad_q_kernel[(n // 64 * some * HEADS,)](*tensors, *sizes, **constants, num_warps=4)
            out = of_bias if start + groups * 3 >= n else total
            grid = (ceil_div(n, 16) * ceil_div(n, attention.FOLD_PLANES["BK"]) * HEADS, 1, 1)
            folding = {"CONTINUES": start > 0, "TILE": tile, **attention.FOLD_PLANES}
            fold = (planes, total, out, HEADS, n, n, some)
            launch(attention.fold_planes_kernel, grid, attention.FOUR_WARPS, fold, **folding)

    package = partial(attention.launch_grad_q, call, made.do, lse2, delta, theirs, plan.grad_q, dbias)
    yield from compared(n, "queries", package, theirs, {"planes": (ours, found)})
    yield from compared(n, "bias", package, dbias, {"planes": (ours, of_bias)})


def compared(
    n: int,
    name: str,
    package: Callable[[], object],
    exact: Tensor,
    others: dict[str, tuple[Callable[[], object], Tensor]],
) -> Iterator[dict[str, object]]:
    """What others leave in their tensors, beside what the package leaves in `exact`, and the time of both."""
    package()
    theirs = do_bench(package, warmup=10, rep=40, return_mode="median")
    for other, (run, found) in others.items():
        run()
        distance = ((found.float() - exact.float()).norm() / exact.float().norm()).item()
        ms = do_bench(run, warmup=10, rep=40, return_mode="median")
        yield {"n": n, "attention": f"{name}, {other}", "distance": distance, "package": theirs, "ms": ms}


def attention_of_any_length(n: int) -> Iterator[dict[str, object]]:
    """The same with the kernel for any length; a row without a key must have NaN for log-sum-exp, and nothing else."""
    made = attention_lab.Problem.make((n - 1, HEADS, n, HEAD))
    mask = made.mask.clone()
    mask[:, 1] = False
    o, found = torch.empty_like(made.q), torch.empty_like(made.q)
    lse = torch.empty((2, *made.q.shape[:-1]), device="cuda")
    forward = attention.plan_for(made.q, "ieee").forward
    for given in (None, mask):
        call = attention.make_call(made.q, made.k, made.v, made.bias, given, HEAD**-0.5, "ieee", False)
        package = partial(attention.launch_forward, call, o, lse, forward)
        package()
        theirs = do_bench(package, warmup=10, rep=40, return_mode="median")
        strides = [stride for t in (call.q, call.k, call.v, o) for stride in attention.strides8(t)]
        arguments = (
            call.q,
            call.k,
            call.v,
            call.bias.view(torch.int32),
            mask,
            found,
            lse[1],
            *call.sizes,
            *strides,
        )
        arguments = (*arguments, *mask.stride()[:2], call.unit_scale)
        rows, heads, queries, _ = call.sizes
        grid = (ceil_div(queries, 64) * ceil_div(rows, 2) * heads * call.q.shape[0],)
        for stages in (3, 4):
            constants = {"MASKED": given is not None, "D": HEAD, "STAGES": stages}
            run = partial(forward_kernel[grid], *arguments, **constants, num_warps=4, maxnreg=128)
            run()
            kept = lse[1].isfinite()
            unset = (~kept).logical_xor(lse[0].isinf()).sum().item()
            apart = torch.where(kept[..., None], found.float() - o.float(), 0.0).norm() / o.float().norm()
            of_lse = (lse[1] - lse[0])[kept].abs().max().item()
            row = {"n": n, "attention of any length": stages, "masked": given is not None, "unset": unset}
            row |= {"distance": apart.item(), "lse": of_lse, "package": theirs}
            yield row | {"ms": do_bench(run, warmup=10, rep=40, return_mode="median")}


def main() -> None:
    """Compare and time all of them at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "hopper_attention_lab.jsonl").open("w") as file:
        for n in LENGTHS:
            parts = [attention_of_any_length]
            if n % 128 == 0:  # whole tiles and turns
                parts += [attention_forward, attention_gradients]
            for row in (row for part in parts for row in part(n)):
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
