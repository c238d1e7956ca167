"""One GPU call for kernels in Gluon, Triton's lower level, beside the package's: is it worth having them in it?

python bench/gluon_lab.py --out DIR      (under a minute on one Hopper card)

Triton waits for a product where it is issued, so that a program multiplies or computes, never both: of the samples of triangle
multiplication's input projections a third are waits for products. Gluon says when to wait. Here the product of the next tile, or
of the next chunk of hidden units, runs beside the end of the one before.

Six kernels, bf16, whole tiles only (N a multiple of 64): at 128 channels triangle multiplication's input projections, its output side's
forward pass and the transition's; of attention, 4 heads of 32, the forward pass, where products also mask the keys and sum the
exponentials, and its gradients, where they add log-sum-exp and delta. That of queries takes three rows a program: where they divide N. Each is compared with the package's kernel, entry by entry, and both are timed. Compiled for sm_90 by Triton 3.6; not
run yet.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import attention_lab
import fused_lab
import torch
import triangle_lab
from gluon_attention import attention_kernel, grad_kv_kernel, grad_q_kernel
from gluon_pair import output_kernel, project_kernel, transition_kernel
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.attention import launch as attention
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, processors
from optimized.ops.parameters import pack
from optimized.ops.transition import launch as transition
from optimized.ops.triangle_multiplication import launch as triangle

LENGTHS = (384, 768, 1024)
C, HIDDEN, EPS = 128, 512, 1e-5
HEADS, HEAD = 4, 32
SAME = 2e-3
"""How far from the package's results, over their norm, sums in another order may be: bf16 rounds to 2⁻⁹."""


def beside(sums: Tensor, biases: Tensor, first: int) -> Tensor:
    """`folded.beside_weights`, its six columns from `first` on: `[rows, 16]` in bf16."""
    made = sums.new_zeros(sums.numel(), 16)
    for column, value in ((first, biases), (first + 3, sums)):
        high = value.bfloat16().float()
        made[:, column] = made[:, column + 1] = high
        made[:, column + 2] = value - high
    return made.bfloat16()


Case = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def triangle_cases(n: int) -> list[Case]:
    """Input projections and output side: name, the package's, Gluon's."""
    made = triangle_lab.Bench(n)
    shape, folded, area = made.shape, made.folded, made.shape.padded**2
    h, x = shape.hidden, made.grad[:C]
    inner = beside(folded.sums[: 4 * h], folded.sums[4 * h : 8 * h], 0)
    # Of out: Σw', β·w; then of g.
    rest = folded.sums[8 * h :]
    outer = torch.stack([beside(rest[:C], rest[C : 2 * C], 6), beside(rest[2 * C : 3 * C], rest[3 * C :], 0)])
    ends = folded.weights.flatten()[4 * h * C :]
    ab = torch.empty((2 * h, shape.padded, shape.padded), dtype=torch.bfloat16, device="cuda")
    y = torch.empty((n, n, C), dtype=torch.bfloat16, device="cuda")

    def project(tile: tuple[int, int, int], residents: int) -> Tensor:
        rows, width, stages = tile
        columns = 2 * h // width
        group = ceil_div(area // rows, residents * processors(ab.device) // columns)
        grid = (ceil_div(area // rows, group), columns)
        arguments = (
            made.z,
            made.stats[4],
            made.moments[4:],
            folded.weights,
            inner,
            ab,
            shape.padded,
            group,
        )
        project_kernel[grid](*arguments, WIDTH=C, H=h, BM=rows, BN=width, STAGES=stages, num_warps=4)
        return ab

    def output(stages: int) -> Tensor:
        group = ceil_div(area // 64, processors(y.device))
        arguments = (x, made.z, made.stats, made.moments, ends, outer, y, shape.padded, group)
        grid = (ceil_div(area // 64, group),)
        output_kernel[grid](*arguments, WIDTH=C, H=h, BM=64, STAGES=stages, num_warps=8)
        return y

    ours = triangle_lab.config_of(("project_folded", (64, 64, 4, 4)))
    ends_tile = triangle_lab.config_of(("output_folded", (64, 128, 8, 3)))
    stats, moments = made.stats, made.moments
    in_package = lambda: triangle.project_folded(made.z, stats[4], moments[4:], folded, shape, ours)  # noqa: E731
    out_package = lambda: triangle.output_folded(x, made.z, stats, moments, folded, shape, ends_tile)  # noqa: E731
    found: list[Case] = []
    for tile in ((64, 64, 4), (64, 64, 3), (64, 32, 4)):
        found.append((f"project {tile}", in_package, lambda tile=tile: project(tile, 2)))
    for stages in (3, 4):
        found.append((f"output {stages} stages", out_package, lambda stages=stages: output(stages)))
    return found


def transition_cases(n: int) -> list[Case]:
    """The transition's forward pass: name, the package's, Gluon's."""
    x = torch.randn(n * n, C, device="cuda").bfloat16()
    gamma, beta, *weights = fused_lab.parameters("tr")
    w, y = pack(weights, torch.bfloat16), torch.empty_like(x)

    def ours(tile: tuple[int, int, int], residents: int) -> Tensor:
        rows, width, warps = tile
        tiles = x.shape[0] // rows
        # Whole groups only: a program takes every tile of its group.
        group = 1 if residents == 0 else ceil_div(tiles, residents * processors(x.device))
        while tiles % group:
            group += 1
        grid = (tiles // group,)
        arguments = (x, gamma, beta, w, y, group, EPS)
        transition_kernel[grid](*arguments, WIDTH=C, H=HIDDEN, BM=rows, BN=width, num_warps=warps)
        return y

    package = lambda: transition.forward(x, (gamma, beta), w, EPS)  # noqa: E731
    return [
        (f"transition {tile}, {r} resident", package, lambda tile=tile, r=r: ours(tile, r))
        for tile in ((64, 32, 4), (64, 64, 4), (128, 64, 8))
        for r in (0, 2)
    ]


def attention_cases(n: int, masked: bool) -> list[Case]:
    """Attention's forward pass: name, the package's, Gluon's."""
    made = attention_lab.Problem.make((n, HEADS, n, HEAD))
    mask = made.mask if masked else None
    call = attention.make_call(made.q, made.k, made.v, made.bias, mask, HEAD**-0.5, "ieee", True)
    beyond = torch.zeros((n, n, 16), dtype=torch.bfloat16, device="cuda")
    beyond[..., 0].masked_fill_(~made.mask[0], -1e30)
    o, found, lse = (
        torch.empty_like(made.q),
        torch.empty_like(made.q),
        torch.empty((2, *made.q.shape[:-1]), device="cuda"),
    )
    pairs, forward = call.bias.view(torch.int32), attention.plan_for(made.q, "ieee").forward

    def package() -> Tensor:
        attention.launch_forward(call, o, lse, forward)
        return o

    def ours(keys: int, stages: int, sums: bool) -> Tensor:
        grid = (n // 64 * (n // 2) * HEADS,)
        arguments = (call.q, call.k, call.v, pairs, beyond, found, lse[1], n, n, call.unit_scale)
        constants = {"H": HEADS, "BK": keys, "D": HEAD, "STAGES": stages, "MASKED": masked, "SUMS": sums}
        attention_kernel[grid](*arguments, **constants, num_warps=4)
        return found

    tiles = ((32, 3, False), (32, 3, True), (32, 4, True), (64, 3, False), (64, 3, True))
    name = "attention masked" if masked else "attention"
    return [(f"{name} {tile}", package, lambda tile=tile: ours(*tile)) for tile in tiles]


@dataclass(frozen=True)
class Backward:
    """What attention's gradients take, in the package's form and in Gluon's."""

    made: attention_lab.Problem
    call: attention.Call
    plan: attention.Plan
    lse2: Tensor
    delta: Tensor
    over_scale: Tensor
    """-lse / scale `[1, rows, heads, n]`."""
    sums: Tensor
    """Of o ⊙ do, so laid out."""

    @staticmethod
    def of(n: int) -> "Backward":
        """N rows of N tokens, no key masked."""
        made = attention_lab.Problem.make((n, HEADS, n, HEAD))
        call = attention.make_call(made.q, made.k, made.v, made.bias, None, HEAD**-0.5, "ieee", True)
        plan = attention.plan_for(made.q, "ieee")
        o, lse = torch.empty_like(made.q), torch.empty((2, *made.q.shape[:-1]), device="cuda")
        attention.launch_forward(call, o, lse, plan.forward)
        lse2, delta = attention.launch_statistics(call, o, made.do, lse[0], None)
        sums = (o.float() * made.do.float()).sum(-1)
        return Backward(made, call, plan, lse2, delta, -lse[0] / call.scale, sums)


def key_cases(given: Backward, n: int) -> list[Case]:
    """Gradients of keys and values, one after the other: name, the package's, Gluon's."""
    call, made = given.call, given.made
    turned = attention.turned(call)
    pairs = turned.flipped.view(torch.int32)
    # dk and dv, each `[1, rows, heads, n, d]` as q lies.
    theirs, found = (made.q.new_empty((2, 1, n, n, HEADS, HEAD)).transpose(3, 4) for _ in range(2))

    def package() -> Tensor:
        arguments = (made.do, given.lse2, given.delta, theirs[0], theirs[1])
        attention.launch_grad_kv(turned, *arguments, given.plan.grad_kv)
        return theirs

    def ours(queries: int, stages: int) -> Tensor:
        tensors = (call.q, call.k, call.v, made.do, pairs, given.over_scale, given.sums, found[0], found[1])
        constants = {"H": HEADS, "BQ": queries, "D": HEAD, "STAGES": stages}
        grid = (n // 64 * n * HEADS,)
        grad_kv_kernel[grid](*tensors, n, n, call.scale, call.unit_scale, **constants, num_warps=4)
        return found

    tiles = ((32, 3), (32, 4), (64, 3), (64, 4))
    return [(f"keys and values {tile}", package, lambda tile=tile: ours(*tile)) for tile in tiles]


def query_cases(given: Backward, n: int) -> list[Case]:
    """Gradients of queries and bias from the same launches, chunk by chunk of rows: name, the package's, Gluon's."""
    call, made, config = given.call, given.made, given.plan.grad_q
    beyond = torch.zeros((n, n, 16), dtype=torch.bfloat16, device="cuda")
    beyond[..., :3] = 1.0
    pairs = call.bias.view(torch.int32)
    theirs = torch.empty_like(made.q), torch.empty_like(made.bias)
    found = torch.empty_like(made.q), torch.empty_like(made.bias)
    tile = attention.TILE
    size = ceil_div(n, tile) ** 2 * tile * tile

    def package() -> tuple[Tensor, Tensor]:
        attention.launch_grad_q(call, made.do, given.lse2, given.delta, theirs[0], config, theirs[1])
        return theirs

    def ours(keys: int) -> tuple[Tensor, Tensor]:
        dq, dbias = found
        groups = attention.plane_groups(call, config, dbias, False)
        planes = torch.empty((groups, HEADS, size), dtype=torch.bfloat16, device="cuda")
        total = torch.empty(dbias.shape, dtype=torch.float32, device="cuda")
        tensors = (call.q, call.k, call.v, made.do, pairs, beyond, given.over_scale, given.sums, dq, planes)
        constants = {"H": HEADS, "ROWS": 3, "BK": keys, "D": HEAD, "STAGES": 3}
        for start in range(0, n, groups * 3):
            some = min(groups, (n - start) // 3)
            grid = (n // 64 * some * HEADS,)
            sizes = (n, n, start, some, call.scale, call.unit_scale)
            grad_q_kernel[grid](*tensors, *sizes, **constants, num_warps=4)
            out = dbias if start + groups * 3 >= n else total
            grid = (ceil_div(n, 16) * ceil_div(n, attention.FOLD_PLANES["BK"]) * HEADS, 1, 1)
            fold = (planes, total, out, HEADS, n, n, some)
            folding = {"CONTINUES": start > 0, "TILE": tile, **attention.FOLD_PLANES}
            launch(attention.fold_planes_kernel, grid, attention.FOUR_WARPS, fold, **folding)
        return found

    return [
        (f"{name} ({keys}, 3)", lambda i=i: package()[i], lambda i=i, keys=keys: ours(keys)[i])
        for keys in (32, 64)
        for i, name in enumerate(("queries", "bias"))
    ]


CASES: dict[str, Callable[[int], list[Case]]] = {
    "triangle": triangle_cases,
    "transition": transition_cases,
    "attention": lambda n: [*attention_cases(n, False), *attention_cases(n, True)],
    "keys": lambda n: key_cases(Backward.of(n), n),
    "queries": lambda n: query_cases(Backward.of(n), n) if n % 3 == 0 else [],
}


def where(exact: Tensor, found: Tensor) -> dict[str, object]:
    """What of `found` is wrong: the share of entries, of them not finite, and of each axis the first and last index."""
    wrong = ~((found - exact).abs() <= 0.05 * exact.abs().max())
    spans = [span(wrong, axis) for axis in range(wrong.ndim)]
    unset = (~found.isfinite()).float().mean().item()
    ratio = ((found * exact).sum() / exact.square().sum()).item()
    return {"wrong": wrong.float().mean().item(), "not_finite": unset, "spans": spans, "slope": ratio}


def span(wrong: Tensor, axis: int) -> tuple[int, int, int]:
    """First and last index along an axis where anything is wrong, and how many are."""
    others = [other for other in range(wrong.ndim) if other != axis]
    found = (wrong.any(others) if others else wrong).nonzero().flatten().tolist()
    return (found[0], found[-1], len(found)) if found else (0, 0, 0)


def main() -> None:
    """Compare and time all of them at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", default=",".join(CASES), help="groups of kernels, comma-separated")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "gluon_lab.jsonl").open("a") as file:
        for n in LENGTHS:
            cases = [case for group in args.only.split(",") for case in CASES[group](n)]
            for name, package, gluons in cases:
                row = {"n": n, "kernel": name}
                try:
                    exact, found = package().float(), gluons().float()
                    row["distance"] = ((found - exact).norm() / exact.norm()).item()
                    row["same"] = row["distance"] <= SAME
                    if not row["same"]:
                        row["where"] = where(exact, found)
                    row["ms"] = {
                        "package": do_bench(package, warmup=10, rep=40, return_mode="median"),
                        "gluon": do_bench(gluons, warmup=10, rep=40, return_mode="median"),
                    }
                except Exception as error:  # a variant that does not fit the card is a finding
                    row["refused"] = f"{type(error).__name__}: {error}"[:200]
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
