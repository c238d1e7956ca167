"""One GPU call for the output side of triangle multiplication, backward, on Hopper, with its weight gradient in the same kernel.

python bench/output_lab.py --out DIR      (a minute on one Hopper card)

Beside the package's two kernels that of `gluon_output`, which leaves the gate's weight gradient to the second of them. Relative distances
to float64 of dx, rstd · d of the gate, the output projection's gradient and its norm's, whether a repetition is equal in every bit, and ms.
Compiled for sm_90 by Triton 3.6 (224 bytes a thread spilled, addresses for the most part) and not run yet. Writes `output_lab.jsonl`.
"""

# mypy: ignore-errors

from functools import partial

import gluon_output
import lab
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.launcher import launch
from optimized.ops.launching import one_each
from optimized.ops.triangle_multiplication import launch as package
from optimized.ops.triangle_multiplication.layout import HOPPER_TILE, Shape
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

C, EPS = 128, 1e-5
EIGHT = Config({}, 8)
LENGTHS = (45, 101, 384, 450, 768, 1024)


def statistics(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """rstd and -mean · rstd."""
    variance, mean = torch.var_mean(x.float(), dim, correction=0)
    rstd = (variance + EPS).rsqrt()
    return rstd, -mean * rstd


class Problem:
    """Inputs of one length."""

    def __init__(self, n: int) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        self.z = (1.5 * normal(n, n, C) + 0.2).bfloat16()
        self.dy = normal(n, n, C).bfloat16()
        self.shape = Shape.of(self.z, C)
        side = self.shape.padded
        self.x = torch.zeros(C, side, side, device="cuda", dtype=torch.bfloat16)
        self.x[:, :n, :n] = (2 * normal(C, n, n) + 0.5).bfloat16()
        shapes = [(C,) if "norm" in name else (C, C) for name in TriangleWeights._fields]
        w = TriangleWeights(*(normal(*shape) / 11 for shape in shapes))
        self.w = w._replace(norm_in_weight=1 + w.norm_in_weight, norm_out_weight=1 + w.norm_out_weight)
        self.folded, self.packed = package.packed_weights(self.w, self.z, torch.bfloat16)
        self.norms = (
            self.w.norm_out_weight,
            self.w.norm_out_bias,
            self.w.norm_in_weight,
            self.w.norm_in_bias,
        )
        self.stats = torch.zeros(5, side, side, device="cuda")
        inside = (slice(0, n), slice(0, n))
        for plane, values in enumerate(
            (*statistics(self.x[(slice(None), *inside)], 0), *statistics(self.z, 2))
        ):
            self.stats[(plane, *inside)] = values
        self.moments = package.moments_of(self.stats, self.shape, torch.bfloat16)

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """By the package's first kernel: dx, rstd · d of output projection and gate."""
        rest = (self.moments, self.folded, self.dy, self.shape)
        return package.output_backward_folded(self.x, self.z, self.stats, *rest)

    def weights(self, d_linear: Tensor, d_gate: Tensor) -> tuple[Tensor, Tensor]:
        """By its second: partial gradients of both, and shares of the norm's."""
        rest = (self.x, self.z, self.moments, self.norms, self.packed, self.shape)
        return package.output_weight_folded(d_linear, d_gate, *rest)

    def both(self) -> list[Tensor]:
        """By both: dx, rstd · d of the gate, and the gradients of the output projection and of its norm."""
        dx, d_linear, d_gate = self.backward()
        partial, shares = self.weights(d_linear, d_gate)
        return [dx, d_gate, partial.sum(0)[: C * C].view(C, C), shares.sum(0)]

    def fused(self) -> list[Tensor]:
        """The same by one kernel."""
        side = self.shape.padded
        programs, group = one_each(side**2 // HOPPER_TILE, self.z.device)
        dx, d_gate = torch.empty_like(self.x), torch.empty_like(self.x)
        partial = torch.empty((programs, C, C), dtype=torch.float32, device=self.z.device)
        shares = torch.empty((programs, 2 * C), dtype=torch.float32, device=self.z.device)
        pointers = (self.dy, dx, d_gate, *self.norms[:2], self.packed, partial, shares)
        arguments = (self.x, self.z, self.stats, *self.folded, *pointers, *self.shape.place(self.z), group)
        even = self.shape.tokens == side
        launch(gluon_output.backward_kernel, (programs, 1, 1), EIGHT, arguments, EVEN=even)
        return [dx, d_gate, partial.sum(0), shares.sum(0)]

    def exact(self) -> list[Tensor]:
        """The same in float64."""
        n, side = self.z.shape[0], self.shape.padded
        norm = torch.nn.functional.layer_norm
        x = self.x[:, :n, :n].double().permute(1, 2, 0).requires_grad_()
        gamma, beta, gamma_in, beta_in = (t.double() for t in self.norms)
        gamma.requires_grad_(), beta.requires_grad_()
        out = self.w.out.double().requires_grad_()
        gate = norm(self.z.double(), (C,), gamma_in, beta_in, EPS) @ self.w.g.double().t()
        gate = gate.detach().requires_grad_()
        y = (norm(x, (C,), gamma, beta, EPS) @ out.t()) * gate.sigmoid()
        grads = torch.autograd.grad(y, (x, gate, out, gamma, beta), self.dy.double())
        planes = [torch.zeros(C, side, side, device="cuda", dtype=torch.double) for _ in range(2)]
        planes[0][:, :n, :n] = grads[0].permute(2, 0, 1)
        planes[1][:, :n, :n] = (grads[1] * self.stats[2, :n, :n, None]).permute(2, 0, 1)
        return [*planes, grads[2], torch.cat(grads[3:])]


def main() -> None:
    """Compare and time both ways at every length, and the package's two kernels by themselves."""
    rows = lab.Rows(__doc__, "output_lab.jsonl")
    for n in LENGTHS:
        problem = Problem(n)
        exact = problem.exact() if n <= 450 else None
        calls = {"both": (problem.both, exact), "fused": (problem.fused, exact)}
        row = {"n": n} | lab.compared(calls, n >= 384)
        if n >= 384:
            ds = problem.backward()[1:]
            row["backward"] = do_bench(problem.backward, return_mode="median")
            row["weights"] = do_bench(partial(problem.weights, *ds), return_mode="median")
            del ds
        del problem, exact, calls
        rows.put(row)


if __name__ == "__main__":
    main()
