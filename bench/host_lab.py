"""Host time of every operator, in microseconds a call: forward, and forward with backward.

python bench/host_lab.py [--op NAME ...] [--profile NAME] [--parts]

On a CUDA device kernels are really launched, at a length where the host is slower than they are, and the clock stops
before they end. The first row is PyTorch's own multiplication by two, for what hosts differ by. Without a device the
kernels do nothing, and everything around them is as it would be: tensors lie on the CPU, where allocations and the
library's small products cost about what they cost the host of a GPU. Not in the figure is what then happens inside
Triton's launcher and the driver, some 4 µs a launch; their number is printed.

--parts: of both passes, how long the forward pass takes that records a graph, how long backward, and how long their plans
(`optimized.ops.plans`) do, in the threads that follow them and again in this one.
"""

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from optimized.kernels.implementations import MEGAFOLD
from optimized.kernels.problems import OPERATORS, make_problem
from optimized.ops import launcher, plans, support
from optimized.ops.attention import launch as attention

TOKENS = {"cuda": 64, "cpu": 16}
KEPT: list[object] = []  # what must live as long as the process
ROUNDS = 50
DOUBLING = "x * 2"
CALLS = 20  # in a row: more launches than a GPU's queue takes would make the host wait


class Idle:
    """What stands for a compiled kernel where there is no GPU."""

    function = 0
    packed_metadata = ()
    launched = 0

    def run(self, *arguments: object) -> None:
        """Do nothing, and count it."""
        Idle.launched += 1


def without_kernels() -> None:
    """Let operators take tensors on the CPU, and their kernels do nothing there."""
    from triton.runtime.jit import JITFunction

    idle: Any = Idle()
    JITFunction.run = lambda self, *arguments, **settings: idle  # type: ignore[method-assign]
    support.interpreting = lambda: True
    launcher.interpreting = lambda: False
    attention.device_name = lambda device: (
        "none"
    )  # or plans would be those of the interpreter, made at each call
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    # Products take the CPU longer than they take the host of a GPU.
    products = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        products.impl(name, lambda a, b: a.new_empty((*a.shape[:-1], b.shape[-1])), "CPU")
        products.impl(f"{name}.out", lambda a, b, out: out, "CPU")
    KEPT.append(products)


def calls(op: str, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The operator in bfloat16 without gradients, and forward with backward."""
    problem = make_problem(
        op, TOKENS[device], "fp32" if op == "linear" else "bf16", device, small=device == "cpu"
    )
    run = MEGAFOLD[op](problem)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}

    def forward() -> object:
        with torch.no_grad():
            return run(problem.tensors, problem.mask)

    def both() -> object:
        return torch.autograd.grad(run(leaves, problem.mask), list(leaves.values()), problem.grads)

    return forward, both


def doubling(device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """PyTorch's own multiplication of 16 values: what one launch and a walk through a graph cost on this host."""
    x = torch.randn(16, device=device, requires_grad=True)
    grad = torch.randn(16, device=device)
    return lambda: x.detach() * 2.0, lambda: torch.autograd.grad(x * 2.0, x, grad)


def microseconds(call: Callable[[], object], device: str) -> float:
    """Least over rounds of the time a call keeps the host, since other processes only add to it."""
    # Without a GPU, gradients too are computed in this thread.
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(ROUNDS):
        if device == "cuda":
            torch.cuda.synchronize()
        began = clock()
        for _ in range(CALLS):
            call()
        times.append((clock() - began) / CALLS)
    return min(times) * 1e6


def profiled(call: Callable[[], object]) -> None:
    """Print where 1000 calls spend their time."""
    with cProfile.Profile() as profile:
        for _ in range(1000):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(45)


class Timed:
    """A plan's function that notes how long it takes, and what it was last called with."""

    def __init__(self, follow: Callable[..., Any]) -> None:
        self.follow = follow
        self.seconds: list[float] = []
        self.inputs: tuple = ()

    def __call__(self, *inputs: Any) -> Any:
        """Follow the plan."""
        self.inputs, began = inputs, time.perf_counter()
        try:
            return self.follow(*inputs)
        finally:
            self.seconds.append(time.perf_counter() - began)


def parts(op: str, device: str) -> None:
    """Print where the host's time of both passes goes; the queue is emptied after each call, so that it never waits for room."""
    problem = make_problem(
        op, TOKENS[device], "fp32" if op == "linear" else "bf16", device, small=device == "cpu"
    )
    run = MEGAFOLD[op](problem)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    plans._plans.clear()

    def both() -> tuple[float, float]:
        began = time.perf_counter()
        result = run(leaves, problem.mask)
        between = time.perf_counter()
        torch.autograd.grad(result, list(leaves.values()), problem.grads)
        ended = time.perf_counter()
        if device == "cuda":
            torch.cuda.synchronize()
        return between - began, ended - between

    for _ in range(20):
        both()
    for key, plan in plans._plans.items():
        if isinstance(plan, plans.Plan):
            plans._plans[key] = replace(plan, follow=Timed(plan.follow))
    times = [both() for _ in range(ROUNDS * 4)]
    forward, backward = (statistics.median(t) * 1e6 for t in zip(*times, strict=True))
    print(f"{op:34s} forward with a graph {forward:7.1f}   backward {backward:7.1f} us")
    for plan in plans._plans.values():
        if not isinstance(plan, plans.Plan) or not isinstance(plan.follow, Timed) or not plan.follow.seconds:
            continue
        follow = plan.follow
        here = []
        for _ in range(ROUNDS * 4):
            began = time.perf_counter()
            with torch.no_grad():  # as in an operator; some statements write into tensors that are there
                follow.follow(*follow.inputs)
            here.append(time.perf_counter() - began)
            if device == "cuda":
                torch.cuda.synchronize()
        steps = plan.source.count("\n") - 1
        there, own = (statistics.median(t) * 1e6 for t in (follow.seconds, here))
        print(f"    a plan of {steps:3d} statements {there:7.1f}, in this thread {own:7.1f} us", flush=True)


def main() -> None:
    """Measure every operator, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--op", action="append", choices=[*OPERATORS])
    parser.add_argument("--profile", choices=[*OPERATORS], help="print a profile of both passes instead")
    parser.add_argument(
        "--parts", action="store_true", help="print where the time of both passes goes instead"
    )
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if device == "cpu":
        without_kernels()
    print(f"kernels: {'launched on ' + torch.cuda.get_device_name() if device == 'cuda' else 'do nothing'}")
    if chosen.parts:
        for op in chosen.op or OPERATORS:
            parts(op, device)
        return
    plain = [] if chosen.profile else [DOUBLING]
    for op in [chosen.profile] if chosen.profile else [*plain, *(chosen.op or OPERATORS)]:
        forward, both = doubling(device) if op == DOUBLING else calls(op, device)
        for call in (forward, both):
            for _ in range(20):
                call()
        if chosen.profile:
            profiled(both)
            return
        Idle.launched = 0
        forward()
        launches, Idle.launched = Idle.launched, 0
        both()
        launches_both = Idle.launched
        gc.collect()
        gc.disable()
        times = [microseconds(call, device) for call in (forward, both)]
        gc.enable()
        counted = f"   launches {launches} and {launches_both}" if device == "cpu" else ""
        print(f"{op:34s} forward {times[0]:7.1f}   with backward {times[1]:7.1f} us{counted}", flush=True)


if __name__ == "__main__":
    main()
