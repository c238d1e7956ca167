"""One GPU call for the transition on Hopper by three groups of warps that share a ring of weights.

python bench/ring_lab.py --out DIR      (a minute on one Hopper card)

Beside the package's kernels those of `gluon_ring`: forward by two groups and by three, the input gradient by three with LN(x) and dy in
shared memory. Relative distances to float64 of all results, whether a repetition is equal in every bit, and ms, for N² rows of 128 channels
and 512 hidden units. Compiled for sm_90 by Triton 3.6 and not run yet: a wait that never ends is possible, so start it with a
time limit. Writes `ring_lab.jsonl`.
"""

# mypy: ignore-errors
from functools import partial

import gluon_ring
import lab
import torch
from torch import Tensor

from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, one_each
from optimized.ops.parameters import pack
from optimized.ops.transition import hopper_gradient, transition_reference
from optimized.ops.transition import launch as package

C, H, EPS = 128, 512, 1e-5
CHUNKS = H // package.GRADIENT_UNITS
TURNS = CHUNKS // package.GRADIENT_HOPPER.constants["STAGES"]
LENGTHS = (9, 45, 384, 450, 768, 1024)
CASES = ((torch.bfloat16, False), (torch.float32, True))
"""Of x, and whether x is added to the update, and another gradient to dx."""


class Problem:
    """Inputs of n² rows."""

    def __init__(self, n: int, dtype: torch.dtype, added: bool) -> None:
        rows = n * n

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        self.x = (1.5 * normal(rows, C) + 0.2).to(dtype)
        self.dy = normal(rows, C).bfloat16()
        self.added, self.more = added, normal(rows, C).to(dtype) if added else None
        self.norm = (1 + 0.2 * normal(C), 0.1 * normal(C))
        self.weights = [normal(H, C) / 11, normal(H, C) / 11, normal(C, H) / 22]
        self.packed = pack(self.weights, torch.bfloat16)

    def arranged(self) -> Tensor:
        """The weights as the rings take them: part of what is timed."""
        arranged = torch.empty_like(self.packed)
        launch(hopper_gradient.arrange_kernel, (CHUNKS, 1, 1), package.ARRANGE, (self.packed, arranged), H=H)
        return arranged

    def forward(self) -> list[Tensor]:
        """By the package's kernel."""
        return [package.forward(self.x, self.norm, self.packed, EPS, added=self.added)]

    def gradient(self) -> list[Tensor]:
        """By the package's kernel: dx, LN(x) / 2 and the sums for dγ and dβ."""
        dx, n, shares = package.input_gradient(self.x, self.norm, self.packed, self.dy, EPS, more=self.more)
        return [dx, n, shares.sum(0)]

    def forward_ring(self, groups: int) -> list[Tensor]:
        """By a ring."""
        rows = self.x.shape[0]
        programs, group = one_each(ceil_div(rows, 64 * groups), self.x.device)
        out = torch.empty_like(self.x if self.added else self.dy)
        arguments = (self.x, *self.norm, self.arranged(), out, rows, group, TURNS, EPS)
        sizes = {"CHUNKS": CHUNKS, "GROUPS": groups, "ADDED": self.added}
        launch(gluon_ring.forward_kernel, (programs, 1, 1), package.GRADIENT_HOPPER, arguments, **sizes)
        return [out]

    def gradient_ring(self) -> list[Tensor]:
        """By a ring of three groups."""
        rows = self.x.shape[0]
        programs, group = one_each(ceil_div(rows, 192), self.x.device)
        dx, n = torch.empty_like(self.x), torch.empty_like(self.dy)
        shares = torch.empty((3 * programs, 2 * C), dtype=torch.float32, device=self.x.device)
        more = self.x if self.more is None else self.more
        arguments = (self.x, *self.norm, self.arranged(), self.dy, dx, n, shares, more, rows, group)
        sizes = {"CHUNKS": CHUNKS, "GROUPS": 3, "MORE": self.more is not None}
        kernel, config = gluon_ring.input_gradient_kernel, package.GRADIENT_HOPPER
        launch(kernel, (programs, 1, 1), config, (*arguments, TURNS, EPS), **sizes)
        return [dx, n, shares.sum(0)]

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """The results of both passes in float64, of the weights in bf16."""
        x, gamma, beta = (t.double().requires_grad_() for t in (self.x, *self.norm))
        w = [t.bfloat16().double() for t in self.weights]
        y = transition_reference(x, gamma, beta, *w, eps=EPS)
        dx, d_gamma, d_beta = torch.autograd.grad(y, (x, gamma, beta), self.dy.double())
        n = torch.nn.functional.layer_norm(x.detach(), (C,), gamma.detach(), beta.detach(), EPS) / 2
        y = y.detach() + self.x if self.added else y.detach()
        return [y], [dx if self.more is None else dx + self.more, n, torch.cat([d_gamma, d_beta])]


def main() -> None:
    """Compare and time all of them at every length."""
    rows = lab.Rows(__doc__, "ring_lab.jsonl")
    for n in LENGTHS:
        for dtype, added in CASES:
            problem = Problem(n, dtype, added)
            forward, backward = problem.exact() if n <= 384 else (None, None)
            calls = {
                "forward": (problem.forward, forward),
                "forward, 2 groups": (partial(problem.forward_ring, 2), forward),
                "forward, 3 groups": (partial(problem.forward_ring, 3), forward),
                "gradient": (problem.gradient, backward),
                "gradient, 3 groups": (problem.gradient_ring, backward),
            }
            row = {"n": n, "dtype": str(dtype), "added": added} | lab.compared(calls, n >= 384)
            del problem, forward, backward, calls
            rows.put(row)


if __name__ == "__main__":
    main()
