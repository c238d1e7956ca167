"""One GPU call for triangle multiplication on Hopper: input projections, their input gradient and the output side's backward pass.

python bench/apart_lab.py --out DIR [--profile N]      (a minute on one Hopper card)

Beside the package's kernels forms (`gluon_project`, `gluon_gradient`, `gluon_output`) with two groups of four warps that do not wait for each other. Those of the gradient
take 64 channels after 64; 32 after 32; 32 after 32 with the next ones' products asked for before these are differentiated.
Compiled for sm_90 by Triton 3.6, and not run yet. With --profile every kernel runs once at N tokens, between the marks that a
profiler started with it looks for.
"""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gluon_gradient
import gluon_output
import gluon_project
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, processors
from optimized.ops.triangle_multiplication import launch as package
from optimized.ops.triangle_multiplication import statistics
from optimized.ops.triangle_multiplication.layout import Shape
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

C = 128
FORMS = {"apart": 0, "apart, halves": 1, "apart, ahead": 2}
LENGTHS = (64, 50, 101, 384, 450, 768, 1024, 2048)


class Problem:
    """Inputs of one length; of 101 tokens z is a part of wider rows. `full`: z is float32, and what the kernels read is made of it."""

    def __init__(self, n: int, masked: bool, more: bool, full: bool = False) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").bfloat16()

        self.n = n
        z = (1.5 * normal(n, n + (8 if n == 101 else 0), C) + 0.2)[:, :n]
        if full:
            z = z.float()
        shapes = [(C,) if "norm" in name else (C, C) for name in TriangleWeights._fields]
        w = TriangleWeights(*(torch.randn(*shape, device="cuda") / 11 for shape in shapes))
        w = w._replace(norm_in_weight=1 + w.norm_in_weight, norm_out_weight=1 + w.norm_out_weight)
        self.mask = torch.rand(n, n, device="cuda") > 0.1 if masked else None
        self.shape = Shape.of(z, C)
        padded = self.shape.padded
        _, self.x, self.stats = package.forward(z, w, self.mask, True, 1e-5, torch.bfloat16)
        self.folded, self.packed = package.packed_weights(w, z, torch.bfloat16)
        self.z, self.rstd = z, None
        if full:
            room = torch.empty_like(self.stats[2:]), package.empty_moments(z, self.shape, self.folded, 1)
            self.z, self.rstd = package.normalise(z, None, self.shape, 1e-5, *room)
        self.norm = (w.norm_in_weight, w.norm_in_bias)
        self.grad, self.dn = normal(2 * C, padded, padded), normal(padded**2, C)
        self.more = normal(n, n, C).to(z.dtype) if more else None
        self.dy = normal(n, n, C)

    def calls(self) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """By name: dz and shares from dn, which dz may overwrite, and room for LN(z) / 2."""
        given = (self.z, self.norm, self.packed, self.mask, self.grad)

        def triton(dn: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            beside = None if self.rstd is not None else self.more
            dz, shares = package.input_gradient(
                *given, dn, n, self.shape, 1e-5, stats=self.stats, rstd=self.rstd, more=beside
            )
            if self.more is not None and beside is None:
                dz += self.more
            return dz, shares

        found = {"triton": triton}
        if self.rstd is None:
            found["package"] = lambda dn, n: package.input_gradient_hopper(
                *given, dn, n, self.shape, self.stats, self.more
            )
        return found | {name: partial(self.apart, form) for name, form in FORMS.items()}

    def apart(self, form: int, dn: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """As `launch.input_gradient_hopper`, by the kernel whose groups do not wait for each other."""
        z, shape = self.z, self.shape
        tiles = shape.padded**2 // 64
        group = ceil_div(tiles, processors(z.device))
        programs = ceil_div(tiles, group)
        shares = torch.empty((2 * programs, 2 * C), dtype=torch.float32, device="cuda")
        whole = shape.tokens == shape.padded
        wide = self.rstd is not None
        in_place = whole and not wide
        dz = (
            dn.view(z.shape)
            if in_place
            else torch.empty(z.shape, dtype=torch.float32 if wide else z.dtype, device="cuda")
        )
        mask, more = (z if self.mask is None else self.mask), (dz if self.more is None else self.more)
        rstd = self.rstd if wide else shares
        arguments = (z, self.stats, rstd, *self.norm, self.packed, mask, self.grad, dn, dz, n, shares, more)
        sizes = {
            "MASKED": self.mask is not None,
            "EVEN": whole and z.is_contiguous(),
            "NORMAL": wide,
            "MORE": self.more is not None,
        }
        arguments = (*arguments, *shape.place(z), group)
        launch(gluon_gradient.apart_kernel, (programs, 1, 1), Config({}, 4), arguments, FORM=form, **sizes)
        return dz, shares

    def projections(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By name: a and b from statistics `[3, P, P]` of z, which all but those that are given put there."""
        given = (self.z, self.mask)
        moments = package.moments_of(self.stats, self.shape, torch.bfloat16)[statistics.MOMENTS :]
        return {
            "package": lambda stats: package.project_hopper(*given, stats, self.folded, self.shape, 1e-5),
            "apart": partial(self.projected, False),
            "triton, given": lambda stats: package.project_folded(
                self.z, stats[2], moments, self.folded, self.shape
            ),
            "apart, given": partial(self.projected, True),
        }

    def projected(self, given: bool, stats: Tensor) -> Tensor:
        """As `launch.project_hopper`, by the kernel whose groups do not wait for each other."""
        z, shape = self.z, self.shape
        tiles = shape.padded**2 // 64
        group = ceil_div(tiles, processors(z.device))
        ab = torch.empty((2 * C, shape.padded, shape.padded), dtype=z.dtype, device="cuda")
        mask = z if self.mask is None else self.mask
        arguments = (z, mask, stats, *self.folded, ab, *shape.place(z), group, 1e-5)
        sizes = {
            "EVEN": shape.tokens == shape.padded and z.is_contiguous(),
            "MASKED": self.mask is not None,
            "GIVEN": given,
        }
        launch(gluon_project.apart_kernel, (ceil_div(tiles, group), 1, 1), Config({}, 4), arguments, **sizes)
        return ab

    def outputs(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """By name: dx, and the gradients of linear part and gate."""
        moments = package.moments_of(self.stats, self.shape, torch.bfloat16)
        given = (self.x, self.z, self.stats, moments, self.folded, self.dy, self.shape)
        return {"triton": partial(package.output_backward_folded, *given), "apart": self.backward_apart}

    def backward_apart(self) -> tuple[Tensor, ...]:
        """As `launch.output_backward_folded`, by the kernel whose groups do not wait for each other."""
        z, shape = self.z, self.shape
        tiles = shape.padded**2 // 64
        group = ceil_div(tiles, processors(z.device))
        found = tuple(torch.empty_like(self.x) for _ in range(3))
        arguments = (self.x, z, self.stats, *self.folded, self.dy, *found, *shape.place(z), group)
        even = shape.tokens == shape.padded and z.is_contiguous()
        grid = (ceil_div(tiles, group), 1, 1)
        launch(gluon_output.apart_kernel, grid, Config({}, 4), arguments, EVEN=even)
        return found


def apart_by(found: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def row(problem: Problem) -> dict[str, object]:
    """Distances to Triton's kernel, whether repetitions are the same in every bit, and times."""
    found: dict[str, object] = {
        "n": problem.n,
        "masked": problem.mask is not None,
        "more": problem.more is not None,
        "full": problem.rstd is not None,
    }
    calls = problem.calls()
    rows = [torch.full_like(problem.dn, 7.0) for _ in range(2)]
    exact, shares = calls["triton"](problem.dn.clone(), rows[0])
    for name, call in calls.items():
        first, again = (call(problem.dn.clone(), rows[1]) for _ in range(2))
        same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        distances = (
            apart_by(first[0], exact),
            apart_by(first[1].sum(0), shares.sum(0)),
            apart_by(rows[1], rows[0]),
        )
        found[name] = {"distances": distances, "same": same}
        if problem.n >= 384:
            run = partial(call, problem.dn.clone(), rows[1])
            found[name]["ms"] = do_bench(run, warmup=10, rep=50, return_mode="median")
    return found


def projected(problem: Problem) -> dict[str, object]:
    """The same of the projections; the distance of the statistics too, which those of the forward pass are."""
    found: dict[str, object] = {"n": problem.n, "masked": problem.mask is not None}
    exact = None
    for name, call in problem.projections().items():
        stats = problem.stats[2:].clone() if "given" in name else torch.zeros_like(problem.stats[2:])
        ab = call(stats)
        exact = ab if exact is None else exact
        found[name] = {
            "distances": (apart_by(ab, exact), apart_by(stats, problem.stats[2:])),
            "same": torch.equal(ab, call(stats)),
        }
        if problem.n >= 384:
            found[name]["ms"] = do_bench(partial(call, stats), warmup=10, rep=50, return_mode="median")
    return found


def output(problem: Problem) -> dict[str, object]:
    """The same of the output side's backward pass: distances of dx and both gradients."""
    found: dict[str, object] = {"n": problem.n, "masked": problem.mask is not None}
    calls = problem.outputs()
    exact = calls["triton"]()
    for name, call in calls.items():
        first, again = call(), call()
        found[f"output, {name}"] = {
            "distances": [apart_by(a, b) for a, b in zip(first, exact, strict=True)],
            "same": all(map(torch.equal, first, again)),
        }
        if problem.n >= 384:
            ms = do_bench(call, warmup=10, rep=50, return_mode="median")
            found[f"output, {name}"]["ms"] = ms
    return found


def main() -> None:
    """Compare and time all of them at every length, or run each once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--profile", type=int, metavar="N")
    args = parser.parse_args()
    if args.profile:
        problem = Problem(args.profile, masked=True, more=False)
        rows = torch.empty_like(problem.dn)
        gradients = [partial(call, problem.dn.clone(), rows) for call in problem.calls().values()]
        stats = problem.stats[2:].clone()
        projections = [partial(call, stats) for call in problem.projections().values()]
        for call in (*gradients, *projections, *problem.outputs().values()):
            call()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            call()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "apart_lab.jsonl").open("w") as file:
        for n in LENGTHS:
            for masked in (False, True):
                problem = Problem(n, masked, more=n < 384 and masked)
                for found in (projected(problem), row(problem), output(problem)):
                    print(found, flush=True)
                    file.write(json.dumps(found) + "\n")
                del problem
                torch.cuda.empty_cache()
            found = row(Problem(n, True, more=True, full=True))
            print(found, flush=True)
            file.write(json.dumps(found) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
