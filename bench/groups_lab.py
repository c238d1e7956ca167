"""One GPU call for triangle multiplication's input projections on Hopper by more groups of warps than two.

python bench/groups_lab.py --out DIR [--profile N]      (two minutes on one Hopper card, most of them the compiler's)

Beside the package's kernel (`hopper_project`) those of `gluon_groups`: groups of four warps, channels at a time, and whether rows of z
come to registers a tile ahead or are asked for into the second cache. Every form is compared with the package's, of which it gives
the same bits, at lengths of whole tiles and others, and timed. With --profile every form runs once at N tokens, between the marks that a
profiler started with it looks for. Forms are compiled side by side first.
"""

# mypy: ignore-errors
import subprocess
import sys
from functools import partial

import gluon_groups
import lab
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.ops.launcher import launch
from optimized.ops.launching import one_each
from optimized.ops.triangle_multiplication import hopper_launch, layout
from optimized.ops.triangle_multiplication.layout import Shape
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

C = 128
FOUR = Config({}, 4)
LENGTHS = (50, 101, 384, 450, 768, 1024, 2048)
FORMS = ((2, 64, True), (2, 64, False), (3, 64, True), (3, 64, False), (3, 32, True), (3, 32, False), (4, 32, True), (4, 32, False))  # fmt: skip
"""Groups, channels at a time, whether z comes a tile ahead."""
CASES = ((False, False), (True, False), (True, True))
"""Whether a mask is given, and whether statistics are."""


class Problem:
    """Inputs of one length; of 101 tokens z is a part of wider rows."""

    def __init__(self, n: int, masked: bool, given: bool) -> None:
        z = (1.5 * torch.randn(n, n + (8 if n == 101 else 0), 2 * C, device="cuda") + 0.2).bfloat16()
        self.z = z[:, :n, :C] if n == 101 else z[..., :C].contiguous()
        shapes = [(C,) if "norm" in name else (C, C) for name in TriangleWeights._fields]
        w = TriangleWeights(*(torch.randn(*shape, device="cuda") / 11 for shape in shapes))
        w = w._replace(norm_in_weight=1 + w.norm_in_weight)
        self.folded, _ = layout.fold_weights(w, torch.bfloat16)
        self.mask = torch.rand(n, n, device="cuda") > 0.1 if masked else None
        self.shape, self.given = Shape.of(self.z, C), given
        self.stats = torch.empty(3, self.shape.padded, self.shape.padded, device="cuda")
        self.package(False)

    def package(self, given: bool | None = None) -> Tensor:
        """a and b by the package's kernel."""
        given = self.given if given is None else given
        mask = None if given else self.mask
        return hopper_launch.project(self.z, mask, self.stats, self.folded, self.shape, 1e-5, given)

    def form(self, groups: int, step: int, ahead: bool) -> Tensor:
        """a and b by one of `FORMS`."""
        shape, mask = self.shape, None if self.given else self.mask
        programs, group = one_each(shape.padded**2 // layout.HOPPER_TILE, self.z.device)
        ab = torch.empty((2 * C, shape.padded, shape.padded), dtype=self.z.dtype, device="cuda")
        of_mask = self.z if mask is None else mask
        arguments = (self.z, of_mask, self.stats, *self.folded, ab, *shape.place(self.z), group, 1e-5)
        even = shape.tokens == shape.padded and self.z.is_contiguous()
        sizes = {"EVEN": even, "MASKED": mask is not None, "GIVEN": self.given}
        sizes |= {"STEP": step, "GROUPS": groups, "AHEAD": ahead}
        launch(gluon_groups.project_kernel, (programs, 1, 1), FOUR, arguments, **sizes)
        return ab


def compiled(only: int | None) -> None:
    """Compile all forms, a process each, or in this process one of them."""
    if only is None:
        command = [sys.executable, __file__, "--compile"]
        for process in [subprocess.Popen([*command, str(k)]) for k in range(len(FORMS))]:
            if process.wait():
                print("a form did not compile", flush=True)
        return
    for n in (50, 384):
        for case in CASES:
            Problem(n, *case).form(*FORMS[only])
    torch.cuda.synchronize()


def main() -> None:
    """Compare and time every form at every length, or run each once."""
    parser = lab.options(__doc__)
    parser.add_argument("--compile", type=int)
    args = parser.parse_args()
    if args.compile is not None:
        compiled(args.compile)
        return
    if args.profile:
        problem = Problem(args.profile, True, False)
        lab.run_marked((problem.package, *(partial(problem.form, *form) for form in FORMS)))
        return
    compiled(None)
    rows = lab.Rows(args.out, "groups_lab.jsonl")
    for n in LENGTHS:
        for masked, given in CASES:
            problem = Problem(n, masked, given)
            exact, kept = problem.package(), problem.stats.clone()
            row = {"n": n, "masked": masked, "given": given, "forms": {}}
            calls = {"package": problem.package}
            calls |= {str(form): partial(problem.form, *form) for form in FORMS}
            for name, call in calls.items():
                problem.stats.copy_(kept) if given else problem.stats.zero_()
                found = call()
                own = {
                    "same": torch.equal(found, exact) and torch.equal(problem.stats, kept),
                    "again": torch.equal(call(), found),
                }
                if n >= 384:
                    own["ms"] = do_bench(call, warmup=20, rep=100, return_mode="median")
                row["forms"][name] = own
            rows.put(row)
            del problem, exact, kept
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
