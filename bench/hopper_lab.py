"""One GPU call for other forms of the kernels for Hopper, beside the package's.

python bench/hopper_lab.py --out DIR      (half a minute on one Hopper card)

Triangle multiplication's as two programs a multiprocessor (`gluon_pairs`), and tiles of the transition's forward kernel: with 32
hidden units at a time and 168 registers it fits three times, 12 warps instead of 8 (8 bytes spilled). All compiled for sm_90 by
Triton 3.6, and not run yet. Attention: `hopper_attention_lab`.
"""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fused_lab
import torch
import triangle_lab
from gluon_pairs import output_pair_kernel, pair_kernel
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, processors
from optimized.ops.parameters import pack
from optimized.ops.transition import hopper as transition_hopper
from optimized.ops.transition import launch as transition
from optimized.ops.triangle_multiplication import launch as package
from optimized.ops.triangle_multiplication.layout import HOPPER_TILE
from optimized.ops.tuning import Config

LENGTHS = (101, 384, 450, 768, 1024, 2048)
EPS = 1e-5


def output_paired(made: triangle_lab.Bench, x: Tensor, stats: Tensor, config: Config) -> Tensor:
    """As `launch.output_hopper`, twice as many programs."""
    z, shape = made.z, made.shape
    tiles = shape.padded**2 // HOPPER_TILE
    group = ceil_div(tiles, 2 * processors(z.device))
    y = torch.empty_like(z)
    arguments = (x, z, stats, *made.folded, y, *shape.place(z), group, EPS)
    launch(
        output_pair_kernel,
        (ceil_div(tiles, group), 1, 1),
        config,
        arguments,
        EVEN=shape.tokens == shape.padded,
    )
    return y


def paired(
    made: triangle_lab.Bench, mask: Tensor | None, stats: Tensor, given: bool, config: Config
) -> Tensor:
    """As `launch.project_hopper`, or with statistics that are `given` as `launch.project_folded`."""
    z, shape = made.z, made.shape
    tiles = shape.padded**2 // HOPPER_TILE
    group = ceil_div(tiles, processors(z.device))
    ab = torch.empty((2 * shape.hidden, shape.padded, shape.padded), dtype=z.dtype, device=z.device)
    arguments = (z, z if mask is None else mask, stats, *made.folded, ab, *shape.place(z), group, EPS)
    sizes = {"EVEN": shape.tokens == shape.padded, "MASKED": mask is not None, "GIVEN": given}
    launch(pair_kernel, (ceil_div(tiles, group), 2, 1), config, arguments, **sizes)
    return ab


def outputs(n: int) -> Iterator[dict[str, object]]:
    """Both forms of the output side."""
    made = triangle_lab.Bench(n)
    x, exact = made.grad[:128], made.stats.clone()
    for registers in (0, 128):
        config = Config({}, 8, max_registers=registers)
        ours = partial(package.output_hopper, x, made.z, exact, made.folded, made.shape, EPS)
        pairs = partial(output_paired, made, x, made.stats, config)
        distance = ((pairs().float() - ours().float()).norm() / ours().float().norm()).item()
        same = bool(torch.equal(exact, made.stats))
        yield {"n": n, "output": registers, "distance": distance, "same statistics": same} | {
            name: do_bench(run, warmup=10, rep=40, return_mode="median")
            for name, run in (("package", ours), ("paired", pairs))
        }


TILES = ((64, 64, 4, 0), (64, 32, 4, 0), (64, 32, 4, 168), (128, 32, 8, 0), (128, 64, 8, 0))
"""Of the transition: rows, hidden units, warps, limit on registers; the package's first."""


def projections(n: int) -> Iterator[dict[str, object]]:
    """Both forms, with a mask and without."""
    made = triangle_lab.Bench(n)
    for mask in (None, torch.rand(n, n, device="cuda") > 0.1):
        exact, stats = (torch.zeros_like(made.stats) for _ in range(2))
        for registers in (0, 128):
            config = Config({"STAGES": 2}, 8, max_registers=registers)
            inner = (made.z, mask, exact[2:], made.folded, made.shape, EPS)
            ours = partial(package.project_hopper, *inner)
            pairs = partial(paired, made, mask, stats[2:], False, config)
            same = bool(torch.equal(ours(), pairs()) and torch.equal(exact, stats))
            yield {"n": n, "masked": mask is not None, "registers": registers, "same": same} | {
                name: do_bench(run, warmup=10, rep=40, return_mode="median")
                for name, run in (("package", ours), ("paired", pairs))
            }
        exact[:2] = exact[2:4]
        inner = (
            made.z,
            exact[4],
            package.moments_of(exact, made.shape, made.z.dtype)[4:],
            made.folded,
            made.shape,
        )
        ours, pairs = (
            partial(package.project_folded, *inner),
            partial(paired, made, None, exact[2:], True, config),
        )
        distance = ((pairs().float() - ours().float()).norm() / ours().float().norm()).item()
        yield {"n": n, "masked": mask is not None, "given": True, "distance": distance} | {
            name: do_bench(run, warmup=10, rep=40, return_mode="median")
            for name, run in (("package", ours), ("paired", pairs))
        }


def transitions(n: int) -> Iterator[dict[str, object]]:
    """The forward kernel in every tile, compared with the package's in Triton."""
    x = torch.randn(n * n, 128, device="cuda").bfloat16()
    gamma, beta, *weights = fused_lab.parameters("tr")
    w, out = pack(weights, torch.bfloat16), torch.empty_like(x)
    plain = transition.default("transition.forward", 128, torch.bfloat16)
    exact = transition.forward(x, (gamma, beta), w, EPS, plain)
    for rows, units, warps, registers in TILES:
        config = Config({"BM": rows, "BN": units}, warps, max_registers=registers)
        grid = (ceil_div(n * n, rows), 1, 1)
        sizes = {"C": 128, "H": 512, "ADDED": False}
        arguments = (x, gamma, beta, w, out, n * n, EPS)
        run = partial(launch, transition_hopper.forward_kernel, grid, config, arguments, **sizes)
        run()
        distance = ((out.float() - exact.float()).norm() / exact.float().norm()).item()
        ms = do_bench(run, warmup=10, rep=40, return_mode="median")
        yield {"n": n, "transition": (rows, units, warps, registers), "distance": distance, "ms": ms}


def main() -> None:
    """Compare and time all of them at every length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "hopper_lab.jsonl").open("w") as file:
        for n in LENGTHS:
            for row in (*projections(n), *outputs(n), *transitions(n)):
                print(row, flush=True)
                file.write(json.dumps(row) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
