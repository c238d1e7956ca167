"""One implementation of one operator: time, memory, errors against fp64, and whether repeats agree bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.compilation import strict_compilation
from baselines.peers import versions
from optimized.kernels import timing
from optimized.kernels.implementations import build
from optimized.kernels.problem import DTYPES, Function, Problem
from optimized.kernels.problems import OPERATORS, make_problem, relative

PASSES = ("fwd", "bwd", "fwdbwd")
ERROR_TOKENS = 200
"""Length at which errors are taken: fp64 needs eight bytes for every score. Not a multiple of 16."""
REPEATS = 5


@dataclass(frozen=True)
class Task:
    """What is measured: an operator, an implementation, a dtype, a length and passes, on a device."""

    op: str
    implementation: str
    dtype: str
    tokens: int
    passes: tuple[str, ...] = PASSES
    device: str = "cuda"
    seed: int = 0
    small: bool = False
    repeat_ms: int = timing.REPEAT_MS


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """The inputs as leaves that want gradients."""
    return {name: tensor.detach().requires_grad_() for name, tensor in problem.tensors.items()}


def outputs_and_gradients(fn: Function, problem: Problem) -> dict[str, Tensor]:
    """Outputs `out`, `out_1` … and the gradient of every input, `d_<name>`."""
    leaves = leaves_of(problem)
    outputs = fn(leaves, problem.mask)
    found = torch.autograd.grad(outputs, list(leaves.values()), problem.grads)
    named = {f"out_{i}" if i else "out": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d_{name}": g for name, g in zip(leaves, found, strict=True)}


def errors_against_fp64(fn: Function, problem: Problem) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the outputs and gradients of `fn`, and of the definition in the same dtype."""
    exact = outputs_and_gradients(problem.definition, problem.cast(torch.float64))
    found = []
    for function in (fn, problem.definition):
        results = outputs_and_gradients(function, problem)
        found.append({name: relative(value, exact[name]) for name, value in results.items()})
    return found[0], found[1]


def differing(fn: Function, problem: Problem, repeats: int) -> list[str]:
    """Outputs and gradients that were not equal, bit for bit, in `repeats` calls with the same inputs."""
    first = outputs_and_gradients(fn, problem)
    odd: set[str] = set()
    for _ in range(repeats - 1):
        again = outputs_and_gradients(fn, problem)
        odd |= {name for name in first if not torch.equal(first[name], again[name])}
    return sorted(odd)


class Passes:
    """The passes of a function on a problem: `fwd` without autograd, `bwd` after a forward pass, `fwdbwd`."""

    def __init__(self, fn: Function, problem: Problem) -> None:
        self._fn, self._problem, self._leaves = fn, problem, leaves_of(problem)

    def forward(self) -> list[Tensor]:
        """The outputs, nothing kept for a backward pass."""
        with torch.no_grad():
            return self._fn(self._leaves, self._problem.mask)

    def graph(self) -> list[Tensor]:
        """The outputs with their graph."""
        return self._fn(self._leaves, self._problem.mask)

    def backward(self, outputs: list[Tensor]) -> Sequence[Tensor]:
        """The gradients of all inputs."""
        return torch.autograd.grad(outputs, list(self._leaves.values()), self._problem.grads)

    def both(self) -> Sequence[Tensor]:
        """Forward and backward."""
        return self.backward(self.graph())

    def times(self, name: str, device: str, repeat_ms: int) -> list[float]:
        """Seconds of every repeat of a pass."""
        if name == "bwd":
            return timing.time_after(self.graph, self.backward, device, repeat_ms)
        return timing.time_calls(self.forward if name == "fwd" else self.both, device, repeat_ms)


@strict_compilation()
def measure(task: Task, errors: dict[str, Any] | None = None) -> dict[str, Any]:
    """The measured fields of a row: passes, memory, kernels' own time, errors, bitwise, cost, versions.

    `errors` of an earlier length of the same implementation are taken over. Exceptions of the implementation pass.
    Compiled code is compiled anew for every length: PyTorch's own limit of eight times would have the later ones run eager.
    """
    torch.manual_seed(task.seed)
    problem = make_problem(task.op, task.tokens, task.dtype, task.device, task.seed, task.small)
    fn = build(task.implementation, problem)
    row: dict[str, Any] = {"versions": versions(task.implementation)}
    run = Passes(fn, problem)
    row["memory"], row["kernels_s"] = {}, {}
    for name, call in (("fwd", run.forward), ("fwdbwd", run.both)):
        if name in task.passes:
            call()  # compiles, fills tuning caches
            row["memory"][name] = timing.peak_rise(call, task.device)
    row["passes"] = {name: {"times_s": run.times(name, task.device, task.repeat_ms)} for name in task.passes}
    for name, call in (("fwd", run.forward), ("fwdbwd", run.both)):
        if name in task.passes:
            row["kernels_s"][name] = timing.kernel_seconds(call, task.device)
    del run
    dtype = DTYPES[task.dtype]
    costs = {name: OPERATORS[task.op].cost(name, task.tokens, dtype) for name in task.passes}
    row["cost"] = {name: vars(cost) for name, cost in costs.items()}
    odd = differing(fn, problem, REPEATS)
    row["bitwise"] = {"repeats": REPEATS, "differing": odd}
    del problem
    row["errors"] = errors or _errors(task)
    return row


def _errors(task: Task) -> dict[str, Any]:
    tokens = ERROR_TOKENS if task.device == "cuda" else min(task.tokens, ERROR_TOKENS)
    problem = make_problem(task.op, tokens, task.dtype, task.device, task.seed + 1, task.small)
    own, definition = errors_against_fp64(build(task.implementation, problem), problem)
    return {"tokens": tokens, "own": own, "definition": definition}
