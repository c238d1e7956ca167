"""One GPU call for gated output on Hopper by groups of warps with the weights in shared memory.

python bench/gated_lab.py --out DIR [--profile N]      (half a minute on one Hopper card)

Beside the package's forward kernel those of `gluon_gated`, by two and by three groups: relative distances to float64, whether a repetition
is equal in every bit, and ms, for N² rows of 128 channels with and without dropout shared by rows and a residual. With --profile all run
once at N² rows, between the marks that a profiler started with it looks for. Compiled for sm_90 by Triton 3.6, and not run yet.
"""

# mypy: ignore-errors
from functools import partial

import gluon_gated
import lab
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.gated_output import launch as package
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, one_each
from optimized.ops.tuning import Config

C = 128
FOUR = Config({}, 4)
LENGTHS = (9, 45, 384, 450, 768, 1024)
BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CASES = ((BF, BF, True), (HALF, FULL, True), (HALF, FULL, False), (BF, None, False))
"""Of x and of the residual, if there is one, and whether there is dropout; gates and products are in bf16."""


class Problem:
    """Inputs of n² rows."""

    def __init__(self, n: int, dtype: torch.dtype, residual: torch.dtype | None, keep: bool) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        self.shape = torch.Size((n, n, C))
        self.x, self.g = normal(n * n, C).to(dtype), normal(n * n, C).to(BF)
        self.residual = None if residual is None else normal(n * n, C).to(residual)
        self.weight = normal(C, C) / 11
        wide = residual or BF
        self.keep = (torch.rand(1, n, C, device="cuda") > 0.25).to(wide) / 0.75 if keep else None
        self.keep = None if self.keep is None else self.keep.expand(self.shape)

    def package(self) -> Tensor:
        """By the package's kernel."""
        tensors = (self.x, self.g, self.weight, self.residual, self.keep)
        return package.forward(*tensors, self.shape, BF)

    def groups(self, groups: int) -> Tensor:
        """By groups of four warps."""
        rows = self.x.shape[0]
        dtype = BF if self.residual is None else torch.promote_types(self.residual.dtype, BF)
        out = torch.empty((rows, C), dtype=dtype, device=self.x.device)
        programs, group = one_each(ceil_div(rows, 64), self.x.device)
        keep = package.Keep.of(self.keep, self.shape, out)
        residual = out if self.residual is None else self.residual
        arguments = (self.x, self.g, self.weight.to(BF), residual, keep.values, out, rows)
        arguments += (keep.columns, keep.row, keep.column, group)
        sizes = {
            "RESIDUAL": self.residual is not None,
            "KEEP": self.keep is not None,
            "GROUPS": groups,
        }
        launch(gluon_gated.forward_kernel, (programs, 1, 1), FOUR, arguments, **sizes)
        return out

    def exact(self) -> Tensor:
        """In float64, of the weights in bf16."""
        y = (self.x.double() * self.g.double().sigmoid()) @ self.weight.to(BF).double().t()
        y = y if self.keep is None else y * self.keep.double().reshape(y.shape)
        return y if self.residual is None else y + self.residual.double()


def main() -> None:
    """Compare and time all of them at every length, or run each once."""
    args = lab.options(__doc__).parse_args()
    if args.profile:
        problem = Problem(args.profile, HALF, FULL, True)
        lab.run_marked((problem.package, partial(problem.groups, 2), partial(problem.groups, 3)))
        return
    rows = lab.Rows(args.out, "gated_lab.jsonl")
    for n in LENGTHS:
        for case in CASES:
            problem = Problem(n, *case)
            exact = problem.exact()
            row = {"n": n, "case": [str(part) for part in case]}
            calls = {"package": problem.package}
            calls |= {f"{groups} groups": partial(problem.groups, groups) for groups in (2, 3)}
            for name, call in calls.items():
                found = call()
                own = {"same": torch.equal(found, call())}
                own["error"] = ((found.double() - exact).norm() / exact.norm()).item()
                if n >= 384:
                    own["ms"] = do_bench(call, warmup=20, rep=100, return_mode="median")
                row[name] = own
            rows.put(row)
            del problem, exact, found
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
