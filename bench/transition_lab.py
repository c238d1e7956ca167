"""One GPU call for the transition's input gradient on Hopper with weights that two groups of warps share.

python bench/transition_lab.py --out DIR [--profile N]      (a minute on one Hopper card)

Beside the package's kernel that of `gluon_transition`: relative distances of dx, LN(x) / 2 and the sums for dγ and dβ to float64 for both, whether
a repetition is equal in every bit, and ms, for N² rows of 128 channels and 512 hidden units. With --profile both run once at N² rows,
between the marks that a profiler started with it looks for. Compiled for sm_90 by Triton 3.6, and not run yet: a wait that never ends
is possible, so start it with a time limit.
"""

# mypy: ignore-errors

import gluon_transition
import lab
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.gluon_parts import value_of
from optimized.ops.launcher import launch
from optimized.ops.launching import ceil_div, one_each
from optimized.ops.parameters import pack
from optimized.ops.transition import launch as package
from optimized.ops.transition import transition_reference
from optimized.ops.tuning import Config

C, H, UNITS = 128, 512, 32
FOUR = Config({"STAGES": 4}, 4)
LENGTHS = (9, 45, 384, 450, 600, 768, 1024)
CASES = ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True))
"""Of x and dx, and whether another gradient is added."""


def arranged(w: Tensor) -> Tensor:
    """The packed weights as the kernel reads them: of 32 hidden units after another w_a, w_b and w_out, channels as products have them."""
    w_a, w_b, w_out = (part.view(*shape) for part, shape in zip(w.split(C * H), ((H, C), (H, C), (C, H))))  # noqa: B905
    units = torch.stack([t.view(H // UNITS, UNITS, C) for t in (w_a, w_b, w_out.t().contiguous())], 1)
    order = torch.tensor([value_of.fn(n) for n in range(C)], device=w.device)
    return units[..., order].reshape(-1).contiguous()


class Problem:
    """Inputs of n² rows."""

    def __init__(self, n: int, dtype: torch.dtype, more: bool) -> None:
        rows = n * n

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        self.x = (1.5 * normal(rows, C) + 0.2).to(dtype)
        self.dy = normal(rows, C).bfloat16()
        self.more = normal(rows, C).to(dtype) if more else None
        self.norm = (1 + 0.2 * normal(C), 0.1 * normal(C))
        self.weights = [normal(H, C) / 11, normal(H, C) / 11, normal(C, H) / 22]
        self.packed = pack(self.weights, torch.bfloat16)
        self.arranged = arranged(self.packed)

    def package(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, LN(x) / 2 and shares by the package's kernel."""
        return package.input_gradient(self.x, self.norm, self.packed, self.dy, 1e-5, more=self.more)

    def shared(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same by the other kernel."""
        rows = self.x.shape[0]
        programs, group = one_each(ceil_div(rows, 128), self.x.device)
        dx, n = torch.empty_like(self.x), torch.empty_like(self.dy)
        shares = torch.empty((2 * programs, 2 * C), dtype=torch.float32, device=self.x.device)
        more = self.x if self.more is None else self.more
        arguments = (self.x, *self.norm, self.arranged, self.dy, dx, n, shares, more, rows, group)
        arguments += (H // UNITS // FOUR.constants["STAGES"], 1e-5)
        sizes = {"CHUNKS": H // UNITS, "MORE": self.more is not None}
        launch(gluon_transition.input_gradient_kernel, (programs, 1, 1), FOUR, arguments, **sizes)
        return dx, n, shares

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, of the weights in bf16."""
        x, gamma, beta = (t.double().requires_grad_() for t in (self.x, *self.norm))
        w = [t.bfloat16().double() for t in self.weights]
        y = transition_reference(x, gamma, beta, *w, eps=1e-5)
        dx, d_gamma, d_beta = torch.autograd.grad(y, (x, gamma, beta), self.dy.double())
        n = torch.nn.functional.layer_norm(x.detach(), (C,), gamma.detach(), beta.detach(), 1e-5) / 2
        return dx if self.more is None else dx + self.more, n, torch.cat([d_gamma, d_beta])


def main() -> None:
    """Compare and time both at every length, or run each once."""
    args = lab.options(__doc__).parse_args()
    if args.profile:
        problem = Problem(args.profile, torch.bfloat16, False)
        lab.run_marked((problem.package, problem.shared))
        return
    rows = lab.Rows(args.out, "transition_lab.jsonl")
    for n in LENGTHS:
        for dtype, more in CASES:
            problem = Problem(n, dtype, more)
            row = {"n": n, "dtype": str(dtype), "more": more}
            exact = problem.exact() if n <= 384 else None
            for name in ("package", "shared"):
                call = getattr(problem, name)
                found, again = call(), call()
                own = {"same": all(map(torch.equal, found, again))}
                if exact:
                    results = (*found[:2], found[2].sum(0))
                    own["errors"] = [
                        ((r.double() - e).norm() / e.norm()).item()
                        for r, e in zip(results, exact, strict=True)
                    ]
                if n >= 384:
                    own["ms"] = do_bench(call, warmup=20, rep=100, return_mode="median")
                row[name] = own
            rows.put(row)
            del problem, exact, found, again
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
