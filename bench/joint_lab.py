"""One GPU call for triangle multiplication on Hopper: linear parts and gates from one product, and where a peer's time goes.

python bench/joint_lab.py --out DIR [--profile N] [--peer]      (a minute on one Hopper card)

Beside the package's input projections and their gradient (`hopper_project`, `hopper_gradient`) those of `gluon_joint`, also with
groups of warps that ask for products in turns; of the projections with statistics that are given too. With --profile every kernel runs once at N tokens, between the marks that a profiler started with it looks for; --peer says
by kernel what cuEquivariance's forward pass takes.
"""

# mypy: ignore-errors
import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gluon_joint
import torch
from torch import Tensor
from triton.testing import do_bench

from optimized.kernels.implementations import build
from optimized.kernels.problems import make_problem
from optimized.ops.launcher import launch
from optimized.ops.launching import one_each
from optimized.ops.triangle_multiplication import hopper_launch, statistics
from optimized.ops.triangle_multiplication import launch as package
from optimized.ops.triangle_multiplication.layout import Shape
from optimized.ops.triangle_multiplication.reference import TriangleWeights
from optimized.ops.tuning import Config

C = 128
FOUR = Config({}, 4)
LENGTHS = (50, 101, 384, 450, 768, 1024, 2048)


class Problem:
    """Inputs of one length; of 101 tokens z is a part of wider rows. `full`: z is float32 and another gradient is added."""

    def __init__(self, n: int, masked: bool, full: bool = False) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").bfloat16()

        self.n = n
        z = (1.5 * normal(n, n + (8 if n == 101 else 0), C) + 0.2)[:, :n]
        z = z.float() if full else z
        shapes = [(C,) if "norm" in name else (C, C) for name in TriangleWeights._fields]
        w = TriangleWeights(*(torch.randn(*shape, device="cuda") / 11 for shape in shapes))
        w = w._replace(norm_in_weight=1 + w.norm_in_weight, norm_out_weight=1 + w.norm_out_weight)
        self.mask = torch.rand(n, n, device="cuda") > 0.1 if masked else None
        self.shape = Shape.of(z, C)
        _, self.x, self.stats = package.forward(z, w, self.mask, True, 1e-5, torch.bfloat16)
        self.folded, self.packed = package.packed_weights(w, z, torch.bfloat16)
        self.z, self.rstd = z, None
        if full:
            room = torch.empty_like(self.stats[2:]), package.empty_moments(z, self.shape, self.folded, 1)
            self.z, self.rstd = package.normalise(z, None, self.shape, 1e-5, *room)
        self.norm = (w.norm_in_weight, w.norm_in_bias)
        self.moments = package.moments_of(self.stats, self.shape, torch.bfloat16)
        outputs = (self.x, self.z, self.stats, self.moments, self.folded, normal(n, n, C), self.shape)
        self.d_gate = package.output_backward_folded(*outputs)[2]
        self.grad = normal(2 * C, *self.d_gate.shape[1:])
        self.more = normal(n, n, C).to(z.dtype) if full else None

    def sizes(self) -> dict[str, bool]:
        """What both kernels are compiled for."""
        even = self.shape.tokens == self.shape.padded and self.z.is_contiguous()
        return {"EVEN": even, "MASKED": self.mask is not None}

    def programs(self) -> tuple[int, int]:
        """One on each multiprocessor, and the tiles of each."""
        return one_each(self.shape.padded**2 // 64, self.z.device)

    def gradients(self) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """By name: dz and shares, and LN(z) / 2 in the room that is given."""
        given = (self.z, self.norm, self.packed, self.mask, self.grad, self.d_gate)
        return {
            "package": lambda n: hopper_launch.input_gradient(
                *given, n, self.shape, self.stats, self.rstd, self.more
            ),
        } | {f"joint, turns {turns}": partial(self.gradient, turns) for turns in (0, 1, 2)}

    def gradient(self, turns: int, n: Tensor) -> tuple[Tensor, Tensor]:
        """As `hopper_launch.input_gradient`."""
        programs, group = self.programs()
        shares = torch.empty((2 * programs, 2 * C), dtype=torch.float32, device="cuda")
        kind = self.z.dtype if self.rstd is None else torch.float32
        dz = torch.empty((self.n, self.n, C), dtype=kind, device="cuda")
        mask, more = (self.z if self.mask is None else self.mask), (dz if self.more is None else self.more)
        rstd = shares if self.rstd is None else self.rstd
        pointers = (mask, self.grad, self.d_gate, dz, n, shares, more)
        arguments = (
            self.z,
            self.stats,
            rstd,
            *self.norm,
            self.packed,
            *pointers,
            *self.shape.place(self.z),
            group,
        )
        sizes = self.sizes() | {"NORMAL": self.rstd is not None, "MORE": self.more is not None}
        sizes |= {"TURNS": turns}
        launch(gluon_joint.input_gradient_kernel, (programs, 1, 1), FOUR, arguments, **sizes)
        return dz, shares

    def projections(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """By name: a and b; statistics `[3, P, P]` of z are put where they are given, but where they are given."""
        moments = self.moments[statistics.MOMENTS :]
        found = {
            "package": lambda stats: hopper_launch.project(
                self.z, self.mask, stats, self.folded, self.shape, 1e-5
            ),
            "triton, given": lambda _: package.project_folded(
                self.z, self.stats[4], moments, self.folded, self.shape
            ),
        }
        for turns in (0, 1, 2):
            found[f"turns {turns}"] = partial(self.projected, False, turns)
            if turns < 2:
                found[f"turns {turns}, given"] = lambda _, turns=turns: self.projected(
                    True, turns, self.stats[2:]
                )
        return found

    def projected(self, given: bool, turns: int, stats: Tensor) -> Tensor:
        """As `hopper_launch.project`."""
        programs, group = self.programs()
        ab = torch.empty((2 * C, *self.d_gate.shape[1:]), dtype=self.z.dtype, device="cuda")
        mask = self.z if self.mask is None or given else self.mask
        arguments = (self.z, mask, stats, *self.folded, ab, *self.shape.place(self.z), group, 1e-5)
        sizes = {"EVEN": self.sizes()["EVEN"], "MASKED": self.mask is not None and not given}
        sizes |= {"GIVEN": given, "TURNS": turns}
        launch(gluon_joint.project_kernel, (programs, 1, 1), FOUR, arguments, **sizes)
        return ab


def apart(found: Tensor, exact: Tensor) -> float:
    """Relative distance."""
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def compared(calls: dict, room: Tensor, timed: bool) -> dict[str, object]:
    """By name: distances to the first of what a call returns and of its room, whether a repetition is the same, and ms."""
    found, exact = {}, None
    for name, call in calls.items():
        own = torch.zeros_like(room)
        first, again = call(own), call(own.clone())
        first, again = (r if isinstance(r, tuple) else (r,) for r in (first, again))
        results = (*first[:1], *(t.sum(0) for t in first[1:]), own)  # shares differ in number
        exact = results if exact is None else exact
        distances = [apart(a, b) if b.any() else 0.0 for a, b in zip(results, exact, strict=True)]
        found[name] = {"distances": distances, "same": all(map(torch.equal, first, again))}
        if timed:
            found[name]["ms"] = do_bench(partial(call, own), warmup=20, rep=100, return_mode="median")
    return found


def peer(n: int) -> dict[str, float]:
    """ms of the kernels of cuEquivariance's forward pass, by name."""
    problem = make_problem("triangle_multiplication_outgoing", n, "bf16", "cuda")
    call = build("cuequivariance", problem)
    with torch.no_grad():
        for _ in range(3):
            call(problem.tensors, problem.mask)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                call(problem.tensors, problem.mask)
            torch.cuda.synchronize()
    return {e.key: e.self_device_time_total / 10e3 for e in profile.key_averages()}


def main() -> None:
    """Compare and time all of them at every length, or run each once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--profile", type=int, metavar="N")
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    if args.profile:
        problem = Problem(args.profile, masked=True)
        rows, stats = torch.empty_like(problem.d_gate.view(-1, C)), torch.empty_like(problem.stats[2:])
        calls = [partial(call, rows) for call in problem.gradients().values()]
        calls += [partial(call, stats) for call in problem.projections().values()]
        for call in calls:
            call()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            call()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "joint_lab.jsonl").open("w") as file:

        def put(row: dict[str, object]) -> None:
            print(row, flush=True)
            file.write(json.dumps(row) + "\n")

        if args.peer:
            put({"n": 768, "peer": peer(768)})
        for n in LENGTHS:
            for masked, full in ((False, False), (True, False), (True, True)):
                problem = Problem(n, masked, full)
                row: dict[str, object] = {"n": n, "masked": masked, "full": full}
                rows = problem.d_gate.view(-1, C)
                row["gradient"] = compared(problem.gradients(), rows, n >= 384)
                if not full:
                    row["projections"] = compared(problem.projections(), problem.stats[2:], n >= 384)
                put(row)
                del problem, rows
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
