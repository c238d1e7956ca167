"""One GPU call for the end of an update, backward, on Hopper: dropout of the gradient, gate and both products in one kernel.

python bench/ending_lab.py --out DIR      (a minute on one Hopper card)

Beside the package's two kernels and the library's two products that of `gluon_ending`: relative distances of dx, dg and dW to float64, whether
a repetition is equal in every bit, and ms, for N² rows of 128 channels with and without dropout shared by rows. Compiled for sm_90 by
Triton 3.6, nothing spilled, and not run yet. Writes `ending_lab.jsonl`.
"""

# mypy: ignore-errors

import gluon_ending
import lab
import torch
from torch import Tensor

from optimized.ops.gated_output import launch as package
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, one_each
from optimized.ops.tuning import Config

C = 128
EIGHT = Config({}, 8)
LENGTHS = (8, 9, 45, 384, 450, 768, 1024)
BF, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CASES = ((FULL, HALF, True), (FULL, HALF, False), (BF, HALF, True), (BF, BF, True))
"""Of the gradient and of x, and whether there is dropout; gates and products are in bf16."""


class Problem:
    """Inputs of n² rows."""

    def __init__(self, n: int, dtype: torch.dtype, of_x: torch.dtype, keep: bool) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        self.shape = torch.Size((n, n, C))
        self.dy, self.x = normal(n * n, C).to(dtype), normal(n * n, C).to(of_x)
        self.g, self.weight = normal(n * n, C).to(BF), (normal(C, C) / 11).to(BF)
        self.keep = (torch.rand(1, n, C, device="cuda") > 0.25).to(dtype) / 0.75 if keep else None
        self.keep = None if self.keep is None else self.keep.expand(self.shape)

    def package(self) -> list[Tensor]:
        """By kernels and the library."""
        du = package.add(None, self.dy, self.keep, self.shape, BF)
        return list(package.library_backward(du, self.x, self.g, self.weight))

    def fused(self) -> list[Tensor]:
        """By one kernel."""
        rows = self.x.shape[0]
        programs, group = one_each(ceil_div(rows, 64), self.x.device)
        dx, dg = torch.empty_like(self.g), torch.empty_like(self.g)
        partial = torch.empty((programs, C, C), dtype=FULL, device=self.x.device)
        keep = package.Keep.of(self.keep, self.shape, self.dy)
        arguments = (self.dy, self.g, self.x, self.weight, keep.values, dx, dg, partial, rows)
        arguments += (keep.columns, keep.row, keep.column, group)
        sizes = {"KEEP": self.keep is not None}
        launch(gluon_ending.backward_kernel, (programs, 1, 1), EIGHT, arguments, **sizes)
        return [dx, dg, partial.sum(0)]

    def exact(self) -> list[Tensor]:
        """In float64."""
        x, g, w = (t.double().requires_grad_() for t in (self.x, self.g, self.weight))
        du = self.dy.double()
        du = du if self.keep is None else du * self.keep.double().reshape(du.shape)
        return list(torch.autograd.grad((x * g.sigmoid()) @ w.t(), (x, g, w), du))


def main() -> None:
    """Compare and time both at every length."""
    rows = lab.Rows(__doc__, "ending_lab.jsonl")
    for n in LENGTHS:
        for case in CASES:
            problem = Problem(n, *case)
            exact = problem.exact()
            calls = {"package": (problem.package, exact), "fused": (problem.fused, exact)}
            row = {"n": n, "case": [str(part) for part in case]} | lab.compared(calls, n >= 384)
            del problem, exact, calls
            rows.put(row)


if __name__ == "__main__":
    main()
